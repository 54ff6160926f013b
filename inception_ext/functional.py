"""The ops as functions, each with the signature and the result of its namesake in
:mod:`inception_ext.reference`.

The kernels are used only where they give what the reference would give; :func:`why_reference` names
the first reason against them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from inception_ext import _library, _weightless, autograd, reference
from inception_ext._gate import (
    PLAIN_TYPES,
    needs_grad,
    runs_on_cpu,
    use_kernels,
    why_aux_pool_reference,
    why_conv3x3_reference,
    why_inference_reference,
    why_lrn_reference,
    why_no_chain_kernel,
    why_no_kernel,
    why_pool_reference,
    why_reference,
    why_unavailable,
)
from inception_ext._launches import Exact, Launcher
from inception_ext._process_group import ALONE, Group
from inception_ext._steps import FoldedInception
from inception_ext._windows import pair

__all__ = [
    "aux_pool",
    "batch_norm_relu",
    "conv3x3",
    "conv_chain",
    "folded_inception",
    "inception",
    "lrn",
    "max_pool",
    "use_kernels",
    "why_reference",
    "why_unavailable",
]


def _note_update(*tensors: Tensor | None) -> None:
    """Tells autograd, and whoever else watches versions, what an op has written to."""
    if not torch.compiler.is_compiling():
        increment_version([tensor for tensor in tensors if tensor is not None])


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
    window = (pair(kernel_size), pair(stride), pair(padding))
    if why_pool_reference(x, kernel_size, stride) is not None or window[2] is None:
        return reference.max_pool(x, kernel_size, stride, padding, ceil_mode)  # type: ignore[arg-type]
    if needs_grad(x):
        return autograd.MaxPool.apply(x, *window, ceil_mode)
    return _library.ops(x).max_pool_forward(x, *window, ceil_mode, False)[0]


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`inception_ext.reference.conv3x3`, channels_last: by Winograd where that is faster.

    float32 on the CPU, with 32 channels or more on either side; the reference elsewhere.
    """
    if why_conv3x3_reference(x, weight) is not None:
        return reference.conv3x3(x, weight)
    if needs_grad(x, weight):
        return autograd.Conv3x3.apply(x, weight)
    return _library.ops(x).conv3x3_forward(x, weight)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: Group = ALONE,
) -> Tensor:
    """:func:`inception_ext.reference.batch_norm_relu` in two passes over x, one in evaluation.

    float16, bfloat16 and float32 on CUDA, float32 and bfloat16 on the CPU (without a group), with
    affine parameters; the reference elsewhere.
    """
    vectors = (weight, bias, running_mean, running_var)
    settings = (training, momentum, eps)
    if (
        why_no_kernel(x) is not None
        or not _has_batch(x, training, group)
        or not _vectors_fit(x, [[v] for v in vectors], [x.shape[1]], training)
    ):
        return reference.batch_norm_relu(x, *vectors, *settings, group)
    if needs_grad(x, weight, bias):  # type: ignore[arg-type]
        y = autograd.BatchNormRelu.apply(x, *vectors, *settings, group)
    else:
        y = _library.ops(x).batch_norm_relu_forward(x, *vectors, *settings, *group)[0]
    if training:
        _note_update(running_mean, running_var)
    return y


def _has_batch(x: Tensor, training: bool, group: Group) -> bool:
    """Whether there are kernels for the group, and a variance to compute where one is needed."""
    if group.size > 1:
        return not runs_on_cpu(x)
    n, _, h, w = x.shape
    return not training or n * h * w > 1


def _vectors_fit(
    x: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    channels: Sequence[int],
    training: bool,
) -> bool:
    """Whether batch norms' vectors go with x; for those that do not, the reference has the error.

    Args:
        lists: weights, biases, running means and variances; the last two may be None in training.
        channels: of each batch norm.
    """
    if training and all(v is None for vectors in lists[2:] for v in vectors):
        lists = lists[:2]
    vectors = [v for vectors in lists for v in vectors]
    dtype = None if vectors[0] is None else vectors[0].dtype
    return dtype in (x.dtype, torch.float32) and all(
        v is not None
        and type(v) in PLAIN_TYPES
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
    group: Group = ALONE,
) -> Tensor:
    """:func:`inception_ext.reference.inception` as one op forward and one backward.

    float32 and bfloat16 on the CPU; float16, bfloat16 and float32 on CUDA; the reference elsewhere.
    Follows autocast.
    """
    vectors = (weights, biases, running_means, running_vars)
    for name, tensors in zip(_INCEPTION_LISTS, (conv_weights, *vectors), strict=True):
        if len(tensors) != 6:
            raise ValueError(f"inception: {name}: expected 6 tensors, got {len(tensors)}")
    if why_no_kernel(x) is None and _has_batch(x, training, group):
        kernels = _autocast(x, conv_weights)
        exact = Exact.by_torch(x.dtype).convolutions
        channels = [k.shape[0] for k in kernels]
        if _convolutions_fit(x, kernels) and _vectors_fit(x, vectors, channels, training):
            statistics = (_given(running_means), _given(running_vars))
            if needs_grad(x, *kernels, *weights, *biases):
                out = autograd.Inception.apply(
                    training,
                    momentum,
                    eps,
                    exact,
                    group,
                    *statistics,
                    x,
                    *kernels,
                    *weights,
                    *biases,
                )
            else:
                settings = (training, momentum, eps, False, exact, *group)
                out = _library.ops(x).inception_forward(
                    x, kernels, weights, biases, *statistics, *settings
                )[0]
            if training:
                _note_update(*running_means, *running_vars)
            return out
    return reference.inception(x, conv_weights, *vectors, training, momentum, eps, group)


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Running statistics as the ops take them: an empty list where there are none."""
    return [tensor for tensor in tensors if tensor is not None]


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
    group: Group = ALONE,
) -> Tensor:
    """:func:`inception_ext.reference.conv_chain` as one op forward and one backward.

    One or two convolutions in float16, bfloat16 or float32 on CUDA, of which the first has stride 1
    or an input that needs no gradient; the reference elsewhere. Follows autocast: it casts x.
    """
    vectors = (weights, biases, running_means, running_vars)
    window = (list(strides), list(paddings), list(pool))
    for name, tensors in zip(_INCEPTION_LISTS, (conv_weights, *vectors), strict=True):
        if len(tensors) != len(strides):
            raise ValueError(
                f"conv_chain: {name}: expected {len(strides)} tensors, got {len(tensors)}"
            )
    if why_no_chain_kernel(x, conv_weights, *window, training, group) is None:
        x = _cast_to_autocast(x)
        kernels = _autocast(x, conv_weights)
        exact = Exact.by_torch(x.dtype).convolutions
        channels = [k.shape[0] for k in kernels]
        if _chain_fits(x, kernels) and _vectors_fit(x, vectors, channels, training):
            statistics = (_given(running_means), _given(running_vars))
            if needs_grad(x, *kernels, *weights, *biases):
                y = autograd.ConvChain.apply(
                    *window,
                    training,
                    momentum,
                    eps,
                    exact,
                    group,
                    *statistics,
                    x,
                    *kernels,
                    *weights,
                    *biases,
                )
            else:
                settings = (training, momentum, eps, False, exact, *group)
                y = _library.ops(x).conv_chain_forward(
                    x, kernels, weights, biases, *statistics, *window, *settings
                )[0]
            if training:
                _note_update(*running_means, *running_vars)
            return y
    return reference.conv_chain(x, conv_weights, *vectors, *window, training, momentum, eps, group)


def _chain_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the convolutions' weights go with x and with one another."""
    dtype = weights[0].dtype
    if dtype != x.dtype and not (dtype == torch.float32 and _casts_weights(x)):
        return False
    inputs = [x.shape[1], *(weight.shape[0] for weight in weights)]
    return all(
        type(weight) in PLAIN_TYPES
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


def _cast_to_autocast(x: Tensor) -> Tensor:
    """x, of a kernel's dtype, as autocast would cast it for the convolution that comes first."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


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
        type(weight) in PLAIN_TYPES
        and weight.dtype == dtype
        and weight.device == x.device
        and size[1:] == (c, r, r)
        for weight, size, c, r in zip(weights, sizes, inputs, kernels, strict=True)
    )


def aux_pool(x: Tensor, output_size: int = 4, kernel_size: int = 0, stride: int = 1) -> Tensor:
    """:func:`inception_ext.reference.aux_pool`, channels_last; its backward has no atomics either.

    float16, bfloat16 and float32 on CUDA; the reference elsewhere.
    """
    window = (output_size, kernel_size, stride)
    if why_aux_pool_reference(x, *window) is not None:
        return reference.aux_pool(x, *window)
    if needs_grad(x):
        return _weightless.AuxPool.apply(x, *window)
    return _library.ops(x).aux_pool_forward(x, *window)


def lrn(
    x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """:func:`inception_ext.reference.lrn`, channels_last, computed in float32.

    float16, bfloat16 and float32 on CUDA; the reference elsewhere. Under autocast the result is
    float32, as the reference's is.
    """
    window = (size, alpha, beta, k)
    if why_lrn_reference(x, *window) is not None:
        return reference.lrn(x, *window)
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    return _weightless.Lrn.apply(x, *window) if needs_grad(x) else _weightless.lrn(x, *window)


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
        or type(x) not in PLAIN_TYPES
        or needs_grad(x, *weights, *biases)
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
