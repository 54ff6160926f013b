"""Convolution + bias + ReLU, the block of the 2014 network.

On CUDA it runs, forward and backward, on the kernels for convolution + batch norm + ReLU: what a
batch norm of mean 0, variance 1, eps 0 and weight 1 does is to add its bias, whose gradient is that
of the convolution's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import functional
from inception_ext._autocast import compute_dtype
from inception_ext._gate import (
    PLAIN_TYPES,
    runs_on_cpu,
    why_hooked,
    why_module_reference,
    why_no_chain_kernel,
    why_no_kernel,
)
from inception_ext._layers import has_square_window, keeps_size, max_pool, pool_window

__all__ = ["ConvReLU", "conv_relu_chain", "conv_relu_inception", "fuses_on_cuda"]


class ConvReLU(nn.Module):
    """Convolution with bias, ReLU; takes what :class:`inception_ext.BasicConv2d` takes."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.relu(self.conv(x))
        else:  # the compiler of TorchScript leaves this branch alone
            return _conv_relu(self, x)


def _conv_relu(block: ConvReLU, x: Tensor) -> Tensor:
    y = _chain([block], None, x)
    return F.relu(block.conv(x)) if y is None else y


def conv_relu_chain(blocks: list[Any], pool: Any, x: Tensor) -> Tensor:
    """Calls one or two blocks and then a pool or None, as one op where it can stand in."""
    if all(_why_block_reference(block) is None for block in blocks):
        y = _chain(blocks, pool, x)
        if y is not None:
            return y
    for block in blocks:
        x = block(x)
    return x if pool is None else max_pool(pool, x)


def _chain(blocks: Sequence[Any], pool: Any, x: Tensor) -> Tensor | None:
    """What the kernels give for convolutions + bias + ReLU and a pool, or None."""
    if not _kernels_take(blocks, x):
        return None
    convs = [block.conv for block in blocks]
    window = [] if pool is None else pool_window(pool)
    if window is None:
        return None
    weights = [conv.weight for conv in convs]
    sizes = ([conv.stride[0] for conv in convs], [conv.padding[0] for conv in convs], window)
    if why_no_chain_kernel(x, weights, *sizes, training=False) is not None:
        return None
    return functional.conv_chain(x, weights, *_batch_norms(convs), *sizes, False, 0.0, 0.0)


def conv_relu_inception(blocks: Sequence[Any], x: Tensor) -> Tensor | None:
    """What the kernels give for an Inception module of six blocks, or None.

    Args:
        blocks: in the order of :func:`inception_ext.functional.inception`.
        x: ``[N, C, H, W]``.
    """
    if any(_why_block_reference(block) is not None for block in blocks):
        return None
    # Where autocast would cast x, the pool would come before that.
    if not _kernels_take(blocks, x) or x.dtype != compute_dtype(x):
        return None
    convs = [block.conv for block in blocks]
    if not all(keeps_size(conv) for conv in convs):
        return None
    weights = [conv.weight for conv in convs]
    return functional.inception(x, weights, *_batch_norms(convs), False, 0.0, 0.0)


def fuses_on_cuda(blocks: Sequence[Any]) -> bool:
    """Whether :func:`conv_relu_inception` takes blocks where x and their parameters suit it."""
    return all(
        _why_block_reference(block) is None
        and why_module_reference(block.conv, nn.Conv2d) is None
        and block.conv.bias is not None
        and has_square_window(block.conv)
        and keeps_size(block.conv)
        for block in blocks
    )


def _why_block_reference(block: Any) -> str | None:
    """Why calling a block does more than :meth:`ConvReLU.forward`, or None."""
    if getattr(type(block), "forward", None) is not ConvReLU.forward:
        return f"{type(block).__name__} in place of ConvReLU"
    return why_hooked(block)


def _kernels_take(blocks: Sequence[Any], x: Tensor) -> bool:
    """Whether convolutions have biases, square windows, and parameters that go with x."""
    if why_no_kernel(x) is not None or runs_on_cpu(x):
        return False
    dtype = compute_dtype(x)
    dtypes = (dtype, torch.float32) if torch.is_autocast_enabled(x.device.type) else (dtype,)
    return all(
        why_module_reference(block.conv, nn.Conv2d) is None
        and has_square_window(block.conv)
        and all(
            type(parameter) in PLAIN_TYPES
            and parameter.device == x.device
            and parameter.dtype in dtypes
            for parameter in (block.conv.weight, block.conv.bias)
        )
        for block in blocks
    )


_Vectors = Sequence[Tensor]


def _batch_norms(convs: Sequence[Any]) -> tuple[_Vectors, _Vectors, _Vectors, _Vectors]:
    """Weights, biases, running means and variances of batch norms that add the biases."""
    biases = [conv.bias for conv in convs]
    sizes = [bias.shape[0] for bias in biases]
    ones = biases[0].new_ones(sum(sizes)).split(sizes)
    zeros = biases[0].new_zeros(sum(sizes)).split(sizes)
    return ones, biases, zeros, ones
