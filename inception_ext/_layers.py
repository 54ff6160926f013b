"""Layers of torch, called through the kernels where these can stand in for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import functional, reference
from inception_ext._gate import (
    why_aux_pool_reference,
    why_lrn_reference,
    why_module_reference,
    why_pool_reference,
)

__all__ = ["aux_pool", "has_square_window", "keeps_size", "lrn", "max_pool", "pool_window"]


def max_pool(pool: Any, x: Tensor) -> Tensor:
    """An ``nn.MaxPool2d``."""
    if (
        torch.jit.is_scripting()
        or why_module_reference(pool, nn.MaxPool2d) is not None
        or why_pool_reference(x, pool.kernel_size, pool.stride) is not None
        or pool.dilation != 1
        or pool.return_indices
    ):
        return pool(x)
    return functional.max_pool(x, pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)


def pool_window(pool: Any) -> list[int] | None:
    """Kernel size, stride, padding and ceil mode of an ``nn.MaxPool2d``, or None.

    None stands for what calling it does beyond that, and for windows that are not square.
    """
    if why_module_reference(pool, nn.MaxPool2d) is not None:
        return None
    sizes = (pool.kernel_size, pool.stride, pool.padding)
    if not all(isinstance(size, int) for size in sizes) or pool.dilation != 1:
        return None
    return None if pool.return_indices else [*sizes, int(pool.ceil_mode)]


def has_square_window(conv: Any) -> bool:
    """Whether all that matters of an ``nn.Conv2d`` are its parameters, one stride, one padding."""
    return (
        _is_square(conv.kernel_size)
        and _is_square(conv.stride)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and _is_square(conv.padding)
    )


def _is_square(size: Any) -> bool:
    return isinstance(size, tuple) and size[0] == size[1]


def keeps_size(conv: Any) -> bool:
    """Whether an ``nn.Conv2d`` with a square window of odd size gives maps as large as x's."""
    return conv.stride[0] == 1 and conv.padding[0] == conv.kernel_size[0] // 2


def lrn(norm: Any, x: Tensor) -> Tensor:
    """An ``nn.LocalResponseNorm``."""
    if why_module_reference(norm, nn.LocalResponseNorm) is None:
        window = (norm.size, norm.alpha, norm.beta, norm.k)
        if why_lrn_reference(x, *window) is None:
            return functional.lrn(x, *window)
    return norm(x)


def aux_pool(x: Tensor, kernel_size: int = 0, stride: int = 1) -> Tensor:
    """Average pool to 4x4: adaptive, or with ``kernel_size`` where maps of x fit exactly."""
    if why_aux_pool_reference(x, 4, kernel_size, stride) is None:
        return functional.aux_pool(x, 4, kernel_size, stride)
    if kernel_size:
        return F.avg_pool2d(x, kernel_size, stride)
    # Where algorithms must be deterministic, PyTorch's own pool refuses to run backward on CUDA.
    if torch.are_deterministic_algorithms_enabled() and not isinstance(x, torch.fx.Proxy):
        return reference.aux_pool(x)
    return F.adaptive_avg_pool2d(x, (4, 4))
