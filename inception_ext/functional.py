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

from inception_ext import _library, autograd, reference

__all__ = ["batch_norm_relu", "inception", "max_pool", "use_kernels", "why_reference"]

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_POOL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

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
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"input is a {type(x).__name__}, not a plain Tensor"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        return "a functorch transform (vmap, grad, jvp, ...) is active"
    elif forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if x.dim() != 4:
        return f"input is {x.dim()}-D, not 4-D"
    if x.device.type != "cpu":
        return f"no kernel for device {x.device.type}"
    if x.dtype not in _CPU_DTYPES:
        return f"no kernel for dtype {x.dtype} on cpu"
    if x.layout != torch.strided:
        return f"no kernel for layout {x.layout}"
    return None


def why_module_reference(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a kernel may not stand in for calling ``module``, or None.

    A replaced, parametrized or subclassed module has another type than ``kind``; hooks would not
    run.
    """
    if type(module) is not kind:
        return f"{type(module).__name__} in place of {kind.__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return f"a hook on a {kind.__name__}"
    return None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


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
    kernel, step, pad = _pair(kernel_size), _pair(stride), _pair(padding)
    if why_pool_reference(x, kernel, step) is not None:
        return reference.max_pool(x, kernel, step, pad, ceil_mode)  # type: ignore[arg-type]
    if _needs_grad(x):
        return autograd.MaxPool.apply(x, kernel, step, pad, ceil_mode)
    return torch.ops.inception_ext.max_pool_forward(x, kernel, step, pad, ceil_mode, False)[0]


def why_pool_reference(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int]
) -> str | None:
    """As :func:`why_reference`, for :func:`max_pool`."""
    kernel, step = _pair(kernel_size), _pair(stride)
    on_cuda = type(x) is Tensor and x.is_cuda
    reason = why_reference(x)
    if on_cuda and reason == "no kernel for device cuda":
        if x.dtype not in _CUDA_POOL_DTYPES or not _library.build_info()["cuda"]:
            return reason
        if not (set(kernel) <= {2, 3} and set(step) <= {1, 2}):
            return "no CUDA kernel for this window"
        return None
    if reason is None and (min(kernel) < 1 or kernel[0] * kernel[1] > 255):
        return "window of more than 255 elements"
    return reason


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

    float32 and bfloat16 on the CPU, with affine parameters and running statistics; the reference
    elsewhere.
    """
    tensors = (weight, bias, running_mean, running_var)
    if (
        why_reference(x) is not None
        or any(t is None for t in tensors)
        or not _statistics_fit(x, tensors, training)  # type: ignore[arg-type]
    ):
        return reference.batch_norm_relu(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    if _needs_grad(x, weight, bias):  # type: ignore[arg-type]
        return autograd.BatchNormRelu.apply(
            x, weight, bias, running_mean, running_var, training, momentum, eps
        )
    return torch.ops.inception_ext.batch_norm_relu_forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps
    )[0]


def _statistics_fit(x: Tensor, vectors: Sequence[Tensor], training: bool) -> bool:
    """Whether batch norm's vectors go with x; the reference words the errors of those that don't."""
    n, channels, h, w = x.shape
    if training and n * h * w <= 1:  # no variance, or nothing to do
        return False
    return all(
        v.dtype in _CPU_DTYPES and v.device == x.device and v.shape == (channels,) for v in vectors
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

    float32 and bfloat16 on the CPU; the reference elsewhere. Follows autocast to bfloat16.
    """
    if why_reference(x) is None:
        x, conv_weights = _autocast(x, conv_weights)
        if _inception_fits(
            x, conv_weights, [*weights, *biases, *running_means, *running_vars], training
        ):
            if _needs_grad(x, *conv_weights, *weights, *biases):
                return autograd.Inception.apply(
                    training,
                    momentum,
                    eps,
                    list(running_means),
                    list(running_vars),
                    x,
                    *conv_weights,
                    *weights,
                    *biases,
                )
            return torch.ops.inception_ext.inception_forward(
                x,
                conv_weights,
                weights,
                biases,
                running_means,
                running_vars,
                training,
                momentum,
                eps,
                False,
            )[0]
    return reference.inception(
        x, conv_weights, weights, biases, running_means, running_vars, training, momentum, eps
    )


def _autocast(x: Tensor, conv_weights: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Casts as autocast would cast a convolution's arguments."""
    if not torch.is_autocast_enabled("cpu"):
        return x, conv_weights
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype), [weight.to(dtype) for weight in conv_weights]


def _inception_fits(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    training: bool,
) -> bool:
    """Whether everything has a dtype, a device and a shape that the op takes."""
    n, channels, h, w = x.shape
    if x.dtype not in _CPU_DTYPES or (training and n * h * w <= 1):
        return False
    sizes = [weight.shape for weight in conv_weights]
    inputs = (channels, channels, sizes[1][0], channels, sizes[3][0], channels)
    kernels = (1, 1, 3, 1, 5 if sizes[4][-1] == 5 else 3, 1)
    for weight, size, c, r in zip(conv_weights, sizes, inputs, kernels, strict=True):
        if weight.dtype != x.dtype or weight.device != x.device or size[1:] != (c, r, r):
            return False
    return all(
        v is not None
        and v.dtype in _CPU_DTYPES
        and v.device == x.device
        and v.shape == (sizes[i % 6][0],)
        for i, v in enumerate(vectors)
    )
