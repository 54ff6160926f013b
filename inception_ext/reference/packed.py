"""Weights packed for the kernels of inference, and a convolution with one."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["conv_packed", "pack_weight", "unpack_weight"]


def pack_weight(weight: Tensor) -> Tensor:
    """``[K, C, R, S]`` to ``[K, ceil8(R * S * C)]``: row k is filter k in (r, s, c) order, then 0.

    So the filter's row r lies as the pixels of a channels_last image do, and rows are a whole
    number of 16-byte vectors.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % 8)).contiguous()


def unpack_weight(packed: Tensor, channels: int, kernel_size: Sequence[int]) -> Tensor:
    """What :func:`pack_weight` packed: ``[K, channels, R, S]``."""
    r, s = kernel_size
    return packed[:, : r * s * channels].unflatten(1, (r, s, channels)).permute(0, 3, 1, 2)


def conv_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """Convolution with a packed weight; sums in float32 (float64 where x is), not rounded yet."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    filters = unpack_weight(weight, x.shape[1], kernel_size).to(dtype)
    return F.conv2d(x.to(dtype), filters, bias.to(dtype), tuple(stride), tuple(padding))
