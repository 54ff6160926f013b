"""The ops as functions, and the one gate that decides between kernel and reference.

Every function here has the signature and the result of its namesake in
:mod:`inception_ext.reference`. The kernels are used only where they give what the reference would
give; :func:`why_reference` names the first reason against them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _has_any_global_hook

from inception_ext import _library, autograd, reference
from inception_ext._launches import Exact, Launcher
from inception_ext._steps import FoldedInception

__all__ = [
    "batch_norm_relu",
    "conv_chain",
    "folded_inception",
    "inception",
    "max_pool",
    "use_kernels",
    "why_reference",
]

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PLAIN_TYPES = {Tensor, nn.Parameter}

_enabled = os.environ.get("INCEPTION_EXT_DISABLE", "0") != "1"


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Turns the kernels off (or on again) within a block, for the whole process."""
    global _enabled
    before = _enabled
    _enabled = enabled
    try:
        yield
    finally:
        _enabled = before


def why_unavailable() -> str | None:
    """Why no kernel runs in this process, or None."""
    if not _library.is_available():
        return f"the compiled kernels are missing ({_library.load_error()})"
    if not _enabled:
        return "turned off (INCEPTION_EXT_DISABLE=1 or use_kernels(False))"
    return None


def why_reference(x: Tensor) -> str | None:
    """Why an activation goes the reference way, or None where the kernels take it.

    Args:
        x: ``[N, C, H, W]``, or anything else that a module may be called with.
    """
    if not _library.is_available() or not _enabled:
        return why_unavailable()
    if type(x) not in _PLAIN_TYPES:
        return f"input is a {type(x).__name__}, not a plain Tensor"
    if _has_any_global_hook():
        return "a hook on all modules"
    if torch.compiler.is_exporting():
        return "torch.export"
    if (reason := _why_transformed()) is not None:
        return reason
    if x.dim() != 4:
        return f"input is {x.dim()}-D, not 4-D"
    if _library.device_type(x) != "cpu":
        return f"no kernel for device {_library.device_type(x)}"
    if x.dtype not in _CPU_DTYPES:
        return f"no kernel for dtype {x.dtype} on cpu"
    if x.layout != torch.strided:
        return f"no kernel for layout {x.layout}"
    return None


def _why_transformed() -> str | None:
    """Why what runs is not only to compute, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if _in_functorch():
        return "a functorch transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def why_inference_reference(x: Tensor, dtype: torch.dtype) -> str | None:
    """As :func:`why_reference`, for inference with folded weights.

    Args:
        x: any tensor on the device that is to compute.
        dtype: of the computation.
    """
    if (reason := why_unavailable() or _why_transformed()) is not None:
        return reason
    if _library.device_type(x) != "cuda":
        return f"no kernel for device {_library.device_type(x)}"
    if dtype not in _CUDA_DTYPES:
        return f"no kernel for dtype {dtype} on cuda"
    return _why_not_on(x.device) if x.is_cuda else None


def why_no_kernel(x: Tensor) -> str | None:
    """As :func:`why_reference`, for the ops that have kernels for the CPU and for CUDA."""
    reason = why_reference(x)
    if reason != "no kernel for device cuda":
        return reason
    if x.dtype not in _CUDA_DTYPES:
        return f"no kernel for dtype {x.dtype} on cuda"
    if x.layout != torch.strided:
        return f"no kernel for layout {x.layout}"
    return _why_not_on(x.device) if x.is_cuda else None


def runs_on_cpu(x: Tensor) -> bool:
    """Whether the kernels that serve x are those of the CPU."""
    return _library.device_type(x) == "cpu"


@torch.compiler.assume_constant_result  # while tracing; torch.compile guards the stack itself
def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def why_module_reference(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a kernel may not stand in for calling ``module``, or None.

    A replaced, parametrized or subclassed module has another type than ``kind``; hooks would not
    run.
    """
    if type(module) is not kind:
        return f"{type(module).__name__} in place of {kind.__name__}"
    return why_hooked(module)


def why_hooked(module: nn.Module) -> str | None:
    """Why calling ``module`` does more than its class's ``forward``, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return f"a hook on a {type(module).__name__}"
    return None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _note_update(*tensors: Tensor | None) -> None:
    """Tells autograd, and whoever else watches versions, what an op has written to."""
    if not torch.compiler.is_compiling():
        increment_version([tensor for tensor in tensors if tensor is not None])


def _pair(value: int | Sequence[int]) -> list[int] | None:
    """[height, width], or None for what is neither a number nor two."""
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, list | tuple) or not all(isinstance(v, int) for v in value):
        return None
    return {1: [*value, *value], 2: [*value]}.get(len(value))


def max_pool(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """:func:`inception_ext.reference.max_pool`, channels_last, with a uint8 index for backward.

    float16, bfloat16 and float32 on CUDA (kernel 2 or 3, stride 1 or 2); float32 and bfloat16 on
    the CPU (window of at most 255 elements); the reference elsewhere.
    """
    window = (_pair(kernel_size), _pair(stride), _pair(padding))
    if why_pool_reference(x, kernel_size, stride) is not None or window[2] is None:
        return reference.max_pool(x, kernel_size, stride, padding, ceil_mode)  # type: ignore[arg-type]
    if _needs_grad(x):
        return autograd.MaxPool.apply(x, *window, ceil_mode)
    return _library.ops(x).max_pool_forward(x, *window, ceil_mode, False)[0]


def why_pool_reference(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int]
) -> str | None:
    """As :func:`why_reference`, for :func:`max_pool`."""
    kernel, step = _pair(kernel_size), _pair(stride)
    if kernel is None or step is None:
        return "a window that is not two integers"
    if (reason := why_no_kernel(x)) is not None:
        return reason
    on_cuda = _library.device_type(x) == "cuda"
    if on_cuda and not (set(kernel) <= {2, 3} and set(step) <= {1, 2}):
        return "no CUDA kernel for this window"
    if min(kernel) < 1 or kernel[0] * kernel[1] > 255:
        return "window of more than 255 elements"
    if x.shape[2] < kernel[0] or x.shape[3] < kernel[1]:
        return "input smaller than the window"  # the reference words the error, if it is one
    return None


@torch.compiler.assume_constant_result  # while tracing: a device stays what it is
def _why_not_on(device: torch.device) -> str | None:
    return _library.why_not_on(torch.cuda.get_device_capability(device))


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`inception_ext.reference.batch_norm_relu` in two passes over x, one in evaluation.

    float16, bfloat16 and float32 on CUDA, float32 and bfloat16 on the CPU, with affine parameters
    and running statistics; the reference elsewhere.
    """
    tensors = (weight, bias, running_mean, running_var)
    if (
        why_no_kernel(x) is not None
        or not _has_batch(x, training)
        or not _vectors_fit(x, tensors, [x.shape[1]])
    ):
        return reference.batch_norm_relu(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    if _needs_grad(x, weight, bias):  # type: ignore[arg-type]
        y = autograd.BatchNormRelu.apply(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    else:
        y = _library.ops(x).batch_norm_relu_forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )[0]
    if training:
        _note_update(running_mean, running_var)
    return y


def _has_batch(x: Tensor, training: bool) -> bool:
    """Whether there is a variance to compute, where one is needed."""
    n, _, h, w = x.shape
    return not training or n * h * w > 1


def _vectors_fit(x: Tensor, vectors: Sequence[Tensor | None], channels: Sequence[int]) -> bool:
    """Whether batch norms' vectors go with x; for those that do not, the reference has the error.

    Args:
        channels: of the first vectors, then of the next, and so on.
    """
    dtype = None if vectors[0] is None else vectors[0].dtype
    return dtype in (x.dtype, torch.float32) and all(
        v is not None
        and type(v) in _PLAIN_TYPES
        and v.dtype == dtype
        and v.device == x.device
        and v.shape == (channels[i % len(channels)],)
        for i, v in enumerate(vectors)
    )


def inception(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`inception_ext.reference.inception` as one op forward and one backward.

    float32 and bfloat16 on the CPU; float16, bfloat16 and float32 on CUDA; the reference elsewhere.
    Follows autocast.
    """
    vectors = (weights, biases, running_means, running_vars)
    for name, tensors in zip(_INCEPTION_LISTS, (conv_weights, *vectors), strict=True):
        if len(tensors) != 6:
            raise ValueError(f"inception: {name}: expected 6 tensors, got {len(tensors)}")
    if why_no_kernel(x) is None and _has_batch(x, training):
        kernels = _autocast(x, conv_weights)
        exact = Exact.by_torch(x.dtype).convolutions
        if _convolutions_fit(x, kernels) and _vectors_fit(
            x, [v for tensors in vectors for v in tensors], [k.shape[0] for k in kernels]
        ):
            if _needs_grad(x, *kernels, *weights, *biases):
                out = autograd.Inception.apply(
                    training,
                    momentum,
                    eps,
                    exact,
                    list(running_means),
                    list(running_vars),
                    x,
                    *kernels,
                    *weights,
                    *biases,
                )
            else:
                out = _library.ops(x).inception_forward(
                    x, kernels, *vectors, training, momentum, eps, False, exact
                )[0]
            if training:
                _note_update(*running_means, *running_vars)
            return out
    return reference.inception(x, conv_weights, *vectors, training, momentum, eps)


def conv_chain(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    strides: Sequence[int],
    paddings: Sequence[int],
    pool: Sequence[int],
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`inception_ext.reference.conv_chain` as one op forward and one backward.

    One or two convolutions in float16, bfloat16 or float32 on CUDA, of which the first has stride 1
    or an input that needs no gradient; the reference elsewhere. Follows autocast.
    """
    vectors = (weights, biases, running_means, running_vars)
    window = (list(strides), list(paddings), list(pool))
    for name, tensors in zip(_INCEPTION_LISTS, (conv_weights, *vectors), strict=True):
        if len(tensors) != len(strides):
            raise ValueError(
                f"conv_chain: {name}: expected {len(strides)} tensors, got {len(tensors)}"
            )
    if why_no_chain_kernel(x, conv_weights, *window, training) is None:
        kernels = _autocast(x, conv_weights)
        exact = Exact.by_torch(x.dtype).convolutions
        if _chain_fits(x, kernels) and _vectors_fit(
            x, [v for tensors in vectors for v in tensors], [k.shape[0] for k in kernels]
        ):
            if _needs_grad(x, *kernels, *weights, *biases):
                lists = (list(running_means), list(running_vars))
                y = autograd.ConvChain.apply(
                    *window,
                    training,
                    momentum,
                    eps,
                    exact,
                    *lists,
                    x,
                    *kernels,
                    *weights,
                    *biases,
                )
            else:
                y = _library.ops(x).conv_chain_forward(
                    x, kernels, *vectors, *window, training, momentum, eps, False, exact
                )[0]
            if training:
                _note_update(*running_means, *running_vars)
            return y
    return reference.conv_chain(x, conv_weights, *vectors, *window, training, momentum, eps)


def why_no_chain_kernel(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    pool: Sequence[int],
    training: bool,
) -> str | None:
    """Why :func:`conv_chain` takes the reference for these sizes, or None."""
    if (reason := why_no_kernel(x)) is not None:
        return reason
    if runs_on_cpu(x):
        return "no kernel for a chain of convolutions on cpu"
    if not 1 <= len(conv_weights) <= 2:
        return f"a chain of {len(conv_weights)} convolutions"
    if strides[0] != 1 and _needs_grad(x):
        return "a convolution with stride whose input needs a gradient"
    if pool and not (pool[0] in (2, 3) and pool[1] in (1, 2) and 2 * pool[2] <= pool[0]):
        return "no CUDA kernel for this pool"
    size = [x.shape[2], x.shape[3]]
    if 0 in x.shape[1:]:
        return "an empty image"
    for i, weight in enumerate(conv_weights):
        if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
            return "a filter that is not square"
        kernel, stride, padding = weight.shape[2], strides[i], paddings[i]
        if not (0 <= padding < kernel <= 127 and 1 <= stride <= 127):
            return "no kernel for this convolution"
        if i > 0 and stride != 1:
            return "a second convolution with stride"
        size = [(s + 2 * padding - kernel) // stride + 1 for s in size]
        if min(size) < 1 or (training and x.shape[0] * size[0] * size[1] == 1):
            return "an output too small"  # the reference words the error
    if pool and min(size) < pool[0]:
        return "an output too small to pool"
    return None


def _chain_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the convolutions' weights go with x and with one another."""
    dtype = weights[0].dtype
    if dtype != x.dtype and not (dtype == torch.float32 and _casts_weights(x)):
        return False
    inputs = [x.shape[1], *(weight.shape[0] for weight in weights)]
    return all(
        type(weight) in _PLAIN_TYPES
        and weight.dtype == dtype
        and weight.device == x.device
        and weight.shape[1] == channels
        for weight, channels in zip(weights, inputs, strict=False)
    )


_INCEPTION_LISTS = ("conv_weights", "weights", "biases", "running_means", "running_vars")


def _autocast(x: Tensor, conv_weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Weights as autocast would cast a convolution's; then x has to have its dtype already.

    On CUDA, float32 weights stay as they are where x has autocast's dtype: the op casts them.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return conv_weights
    dtype = torch.get_autocast_dtype(device)
    if _casts_weights(x):
        return [
            w if w.dtype in (torch.float32, torch.float64) else w.to(dtype) for w in conv_weights
        ]
    # x itself stays as it is: where autocast would cast it, the pool would come before the cast.
    # float64 is not for autocast to change.
    return [w if w.dtype == torch.float64 else w.to(dtype) for w in conv_weights]


def _casts_weights(x: Tensor) -> bool:
    """Whether the inception op takes float32 weights for x, because autocast would cast them."""
    device = x.device.type
    return (
        _library.device_type(x) == "cuda"
        and torch.is_autocast_enabled(device)
        and x.dtype == torch.get_autocast_dtype(device)
    )


def _convolutions_fit(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the convolutions' weights go with x and with one another."""
    if any(weight.dim() != 4 or weight.shape[0] == 0 for weight in weights):
        return False
    if 0 in x.shape[1:]:
        return False
    sizes = [weight.shape for weight in weights]
    inputs = (x.shape[1], x.shape[1], sizes[1][0], x.shape[1], sizes[3][0], x.shape[1])
    kernels = (1, 1, 3, 1, 5 if sizes[4][-1] == 5 else 3, 1)
    dtype = weights[0].dtype
    if dtype != x.dtype and not (dtype == torch.float32 and _casts_weights(x)):
        return False
    return all(
        type(weight) in _PLAIN_TYPES
        and weight.dtype == dtype
        and weight.device == x.device
        and size[1:] == (c, r, r)
        for weight, size, c, r in zip(weights, sizes, inputs, kernels, strict=True)
    )


def folded_inception(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    widths: Sequence[int],
    branch3_kernel_size: int = 3,
) -> Tensor:
    """:func:`inception_ext.reference.folded_inception` in two launches, for inference.

    :func:`inception_ext.engine.fold_inception` makes the arguments of a module. float16, bfloat16
    and float32 on CUDA; the reference elsewhere, and where a gradient is asked for. float32 is
    multiplied as TF32 where ``torch.backends.cudnn.conv.fp32_precision`` says so.
    """
    folded = FoldedInception(weights, biases, widths, branch3_kernel_size)
    if (
        why_inference_reference(x, x.dtype) is not None
        or type(x) not in _PLAIN_TYPES
        or _needs_grad(x, *weights, *biases)
        or not _folded_fits(x, folded)
    ):
        return reference.folded_inception(x, weights, biases, widths, branch3_kernel_size)
    with torch.no_grad():
        return folded.run(Launcher(x, x.dtype, Exact.by_torch(x.dtype)), x)


def _folded_fits(x: Tensor, folded: FoldedInception) -> bool:
    """Whether the parameters of a folded module go with x and with one another."""
    widths, r = list(folded.widths), folded.branch3_kernel_size
    if x.dim() != 4 or len(widths) != 3 or len(folded.weights) != 4 or len(folded.biases) != 4:
        return False
    if min(widths) < 1 or 0 in x.shape[1:] or r not in (1, 3, 5, 7):
        return False
    rows = (x.shape[1], 9 * widths[1], r * r * widths[2], x.shape[1])
    return folded.weights[0].shape[:1] == (sum(widths),) and all(
        weight.dim() == 2
        and (weight.dtype, weight.device) == (x.dtype, x.device)
        and weight.shape[1] == -(-row // 8) * 8
        and (bias.dtype, bias.device) == (torch.float32, x.device)
        and bias.shape == weight.shape[:1]
        for weight, bias, row in zip(folded.weights, folded.biases, rows, strict=True)
    )
