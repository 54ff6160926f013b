"""Steps of a network in inference: folded, packed weights; most write into given tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_ext.reference.layers import lrn, max_pool
from inception_ext.reference.packed import conv_packed

__all__ = [
    "folded_inception",
    "global_avg_pool",
    "lrn_out",
    "max_pool_out",
    "stem_conv_conv_pool",
    "stem_conv_pool",
]


def folded_inception(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    widths: Sequence[int],
    branch3_kernel_size: int = 3,
) -> Tensor:
    """:func:`inception` in evaluation mode, with the batch norms folded into the convolutions.

    Args:
        x: ``[N, C, H, W]``.
        weights: packed (:func:`pack_weight`), in the dtype of x: the three convolutions 1x1 that
            read x as one of ``sum(widths)`` channels, the 3x3, the 5x5, and the one of the pool.
        biases: of these, ``[K]`` each, float32.
        widths: channels that go to the output, to the 3x3 convolution and to the 5x5 one.
        branch3_kernel_size: of the "5x5" convolution.

    Returns:
        ``[N, widths[0] + K_3x3 + K_5x5 + K_pool, H, W]``.
    """

    def conv(i: int, y: Tensor, size: int = 1) -> Tensor:
        padding = (size // 2, size // 2)
        z = conv_packed(y, weights[i], biases[i], (size, size), padding=padding)
        return F.relu(z).to(x.dtype)

    y1, y3, y5 = conv(0, x).split(list(widths), 1)
    pooled = conv(3, max_pool(x, 3, 1, 1))
    return torch.cat([y1, conv(1, y3, 3), conv(2, y5, branch3_kernel_size), pooled], 1)


def stem_conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    exact: bool,
    y: Tensor,
) -> None:
    """Convolution 7x7, stride 2, padding 3 + ReLU, then max pool 3x3, stride 2, ceil mode.

    Args:
        x: ``[N, 3, H, W]`` in any strides, uint8 or floating.
        weight: ``[64, 152]``, packed; its dtype is that of the computation. bias: ``[64]`` float32.
        scale, shift: 3 numbers each: the convolution reads ``x * scale + shift``, rounded to the
            dtype of the weight, and pads that with zeros.
        exact: as in :func:`conv_group`.
        y: ``[N, 64, P, Q]``, written to.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vectors = [torch.tensor(v, dtype=dtype, device=x.device).view(3, 1, 1) for v in (scale, shift)]
    images = (x.to(dtype) * vectors[0] + vectors[1]).to(weight.dtype)
    z = F.relu(conv_packed(images, weight, bias, (7, 7), (2, 2), (3, 3)))
    y.copy_(max_pool(z, 3, 2, ceil_mode=True))


def stem_conv_conv_pool(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    exact: bool,
    y: Tensor,
) -> None:
    """Convolution 1x1 + ReLU, convolution 3x3 + ReLU, max pool 3x3, stride 2, ceil mode.

    Args:
        x: ``[N, 64, H, W]``.
        weight1, weight2: ``[64, 64]`` and ``[192, 576]``, packed. bias1, bias2: float32.
        exact: as in :func:`conv_group`.
        y: ``[N, 192, P, Q]``, written to.
    """
    reduced = F.relu(conv_packed(x, weight1, bias1, (1, 1))).to(x.dtype)
    z = F.relu(conv_packed(reduced, weight2, bias2, (3, 3), padding=(1, 1)))
    y.copy_(max_pool(z, 3, 2, ceil_mode=True))


def max_pool_out(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    y: Tensor,
) -> None:
    """:func:`max_pool` into y ``[N, C, P, Q]``."""
    y.copy_(F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding), ceil_mode=ceil_mode))


def global_avg_pool(x: Tensor, y: Tensor) -> None:
    """Mean of each channel of ``[N, C, H, W]``, summed in float32, into y ``[N, C, 1, 1]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y.copy_(x.to(dtype).mean((2, 3), keepdim=True))


def lrn_out(x: Tensor, size: int, alpha: float, beta: float, k: float, y: Tensor) -> None:
    """:func:`lrn`, computed in float32, into y of x's shape; the op is called ``lrn``."""
    y.copy_(lrn(x.to(torch.promote_types(x.dtype, torch.float32)), size, alpha, beta, k))
