"""Several convolutions at once, or the gradients of their weights, into given tensors."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from inception_ext.reference.layers import max_pool
from inception_ext.reference.packed import conv_packed

__all__ = ["conv_group", "conv_wgrad"]


def conv_group(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    pools: Sequence[bool],
    relus: Sequence[bool],
    segments: Sequence[int],
    exact: bool,
    workspace: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Convolution + bias + ReLU, several at once, each into one to three outputs.

    Args:
        x: of problem i ``[N, C, H, W]``.
        weights: ``[K, ceil8(R * S * C)]`` as :func:`pack_weight` gives them, in the dtype of x.
        biases: ``[K]``, float32.
        kernel_sizes, strides, paddings: ``(h, w)`` of problem 0, ``(h, w)`` of problem 1, ...
        pools: where True, x is max pooled first: 3x3, stride 1, padding 1.
        relus: where False, the sum is written as it is.
        segments: how many of ``outputs``, in turn, share the K channels of problem i.
        exact: float32 is multiplied as float32; otherwise a kernel may round factors to TF32.
        workspace: memory for kernels; not used here.
        outputs: ``[N, K_j, P, Q]``, written to.
    """
    for i, parts in enumerate(_by_problem(outputs, segments)):
        window = (sizes[2 * i : 2 * i + 2] for sizes in (kernel_sizes, strides, paddings))
        y = conv_packed(_read(x[i], pools[i]), weights[i], biases[i], *window)
        _write(F.relu(y) if relus[i] else y, parts, 1)


def conv_wgrad(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    batch_norms: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    pools: Sequence[bool],
    segments: Sequence[int],
    exact: bool,
    workspace: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Gradients of the weights of convolutions, several at once, each into one to three outputs.

    Args:
        grads: gradients of the convolutions' outputs, of problem i ``[N, K, P, Q]``.
        x: what they read, ``[N, C, H, W]``.
        batch_norms: ``[4, C]``, float32: mean, 1 / standard deviation, weight and bias of a batch
            norm + ReLU between x and the convolution; ``[0]``: there is none.
        strides, paddings: ``(h, w)`` of problem 0, ``(h, w)`` of problem 1, ...
        pools: where True, x is max pooled first: 3x3, stride 1, padding 1.
        segments: how many of ``outputs``, in turn, share the K filters of problem i.
        exact: float32 is multiplied as float32; otherwise a kernel may round factors to TF32.
        workspace: memory for kernels; not used here.
        outputs: ``[K_j, C, R, S]``, in the dtype of x or float32, written to.
    """
    for i, parts in enumerate(_by_problem(outputs, segments)):
        read = _read(x[i], pools[i])
        dtype = torch.promote_types(read.dtype, torch.float32)
        if batch_norms[i].numel():
            mean, rstd, weight, bias = (v.view(1, -1, 1, 1) for v in batch_norms[i].to(dtype))
            read = F.relu((read.to(dtype) - mean) * (weight * rstd) + bias).to(read.dtype)
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        stride, padding = strides[2 * i : 2 * i + 2], paddings[2 * i : 2 * i + 2]
        dw = conv2d_weight(read.to(dtype), shape, grads[i].to(dtype), tuple(stride), tuple(padding))
        _write(dw, parts, 0)


def _by_problem(outputs: Sequence[Tensor], segments: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    """The outputs of each problem."""
    first = 0
    for count in segments:
        yield outputs[first : first + count]
        first += count


def _read(x: Tensor, pool: bool) -> Tensor:
    return max_pool(x, 3, 1, 1) if pool else x


def _write(y: Tensor, parts: Sequence[Tensor], axis: int) -> None:
    """Copies slices of y along an axis, as wide as they are, into the parts."""
    widths = [part.shape[axis] for part in parts]
    for part, values in zip(parts, y.split(widths, axis), strict=True):
        part.copy_(values)
