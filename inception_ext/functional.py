"""The ops as functions, each with the signature and the result of its namesake in
:mod:`inception_ext.reference`.

The kernels are used only where they give what the reference would give; :func:`why_reference` names
the first reason against them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from inception_ext import _library, _weightless, autograd, reference
from inception_ext._autocast import cast, cast_weights
from inception_ext._fits import (
    chain_fits,
    folded_inception_fits,
    has_batch,
    inception_fits,
    vectors_fit,
)
from inception_ext._gate import (
    PLAIN_TYPES,
    needs_grad,
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
        or not has_batch(x, training, group)
        or not vectors_fit(x, [[v] for v in vectors], [x.shape[1]], training)
    ):
        return reference.batch_norm_relu(x, *vectors, *settings, group)
    if needs_grad(x, weight, bias):  # type: ignore[arg-type]
        y = autograd.BatchNormRelu.apply(x, *vectors, *settings, group)
    else:
        y = _library.ops(x).batch_norm_relu_forward(x, *vectors, *settings, *group)[0]
    if training:
        _note_update(running_mean, running_var)
    return y


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
    _check_lengths("inception", 6, conv_weights, *vectors)
    if why_no_kernel(x) is None and has_batch(x, training, group):
        kernels = cast_weights(x, conv_weights)
        if inception_fits(x, kernels) and vectors_fit(x, vectors, _widths(kernels), training):
            op = _library.ops(x).inception_forward
            settings = (training, momentum, eps, group)
            return _with_batch_norms(autograd.Inception, op, x, kernels, vectors, (), settings)
    return reference.inception(x, conv_weights, *vectors, training, momentum, eps, group)


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
    _check_lengths("conv_chain", len(strides), conv_weights, *vectors)
    if why_no_chain_kernel(x, conv_weights, *window, training, group) is None:
        x = cast(x)
        kernels = cast_weights(x, conv_weights)
        if chain_fits(x, kernels) and vectors_fit(x, vectors, _widths(kernels), training):
            op = _library.ops(x).conv_chain_forward
            settings = (training, momentum, eps, group)
            return _with_batch_norms(autograd.ConvChain, op, x, kernels, vectors, window, settings)
    return reference.conv_chain(x, conv_weights, *vectors, *window, training, momentum, eps, group)


def _check_lengths(op: str, length: int, *lists: Sequence[Tensor | None]) -> None:
    names = ("conv_weights", "weights", "biases", "running_means", "running_vars")
    for name, tensors in zip(names, lists, strict=True):
        if len(tensors) != length:
            raise ValueError(f"{op}: {name}: expected {length} tensors, got {len(tensors)}")


def _widths(conv_weights: Sequence[Tensor]) -> list[int]:
    """Output channels of each convolution."""
    return [weight.shape[0] for weight in conv_weights]


# Weights, biases, running means and running variances of batch norms.
_Vectors = tuple[
    Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]
]


def _with_batch_norms(
    function: type[torch.autograd.Function],
    op: Callable[..., Sequence[Tensor]],
    x: Tensor,
    conv_weights: Sequence[Tensor],
    vectors: _Vectors,
    window: tuple[list[int], ...],
    settings: tuple[bool, float, float, Group],
) -> Tensor:
    """Convolutions with batch norms: ``function`` where a gradient is asked for, else its op."""
    weights, biases, running_means, running_vars = vectors
    training, momentum, eps, group = settings
    parameters = (*conv_weights, *weights, *biases)
    # The ops take an empty list where there are no running statistics.
    statistics = [[v for v in tensors if v is not None] for tensors in vectors[2:]]
    exact = Exact.by_torch(x.dtype).convolutions
    if needs_grad(x, *parameters):
        arguments = (*window, training, momentum, eps, exact, group, *statistics)
        y = function.apply(*arguments, x, *parameters)
    else:
        lists = (conv_weights, weights, biases, *statistics)
        y = op(x, *lists, *window, training, momentum, eps, False, exact, *group)[0]
    if training:
        _note_update(*running_means, *running_vars)
    return y


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
        or not folded_inception_fits(x, folded)
    ):
        return reference.folded_inception(x, weights, biases, widths, branch3_kernel_size)
    with torch.no_grad():
        return folded.run(Launcher(x, x.dtype, Exact.by_torch(x.dtype)), x)
