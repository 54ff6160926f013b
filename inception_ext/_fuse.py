"""From the modules of a network to the steps that stand for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inception_ext import _library
from inception_ext._fold import fold, is_foldable, is_inception, is_plain
from inception_ext._steps import (
    LRN,
    STEM_POOL,
    Classifier,
    Convolution,
    FoldedInception,
    MaxPool,
    Problem,
    StemConvConvPool,
    StemConvPool,
    Step,
    global_avg_pool,
)
from inception_ext.reference import pack_weight

__all__ = ["classifier", "fold_inception", "fused_step", "has_two_launches"]

_KERNEL_SIZES = (1, 3, 5, 7)  # of conv_group


def fold_inception(block: Any, dtype: torch.dtype) -> FoldedInception:
    """Folds and packs a module that :func:`has_two_launches`."""
    b1, b2, b3, b4 = block.branch1, block.branch2, block.branch3, block.branch4
    reads_x = [fold(conv) for conv in (b1, b2[0], b3[0])]
    merged = tuple(torch.cat(tensors) for tensors in zip(*reads_x, strict=True))
    folded = [merged, fold(b2[1]), fold(b3[1]), fold(b4[1])]
    return FoldedInception(
        [pack_weight(weight.to(dtype)) for weight, _ in folded],
        [bias for _, bias in folded],
        [weight.shape[0] for weight, _ in reads_x],
        b3[1].conv.kernel_size[0],
    )


def fused_step(modules: Sequence[nn.Module], first: bool, dtype: torch.dtype) -> Step | None:
    """The step that stands for these modules, one after the other, or None.

    Args:
        first: whether they read the images.
    """
    if len(modules) == 3 and _is_stem_conv_conv_pool(*modules):
        conv2, conv3 = _problem(modules[0], dtype), _problem(modules[1], dtype)
        return StemConvConvPool(conv2, conv3) if _stem_fits(conv2) else None
    if len(modules) == 2 and first and _is_stem_conv_pool(*modules):
        conv1 = _problem(modules[0], dtype)
        return StemConvPool(conv1) if _stem_fits(conv1) else None
    if len(modules) != 1 or first:
        return None
    module: Any = modules[0]
    if is_foldable(module) and _is_convolution(module.conv):
        return Convolution(_problem(module, dtype))
    if is_inception(module) and has_two_launches(module):
        return fold_inception(module, dtype).run
    if is_plain(module, nn.MaxPool2d) and (pool := _max_pool(module)) is not None:
        return pool
    if is_plain(module, nn.LocalResponseNorm):
        return LRN(module.size, float(module.alpha), float(module.beta), float(module.k))
    if is_plain(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
        return global_avg_pool
    return None


def classifier(module: Any, dtype: torch.dtype) -> Step | None:
    """The step that stands for a linear layer, or None."""
    if not is_plain(module, nn.Linear):
        return None
    weight = module.weight.detach()
    bias = weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.detach()
    packed = pack_weight(weight.to(dtype)[:, :, None, None])
    return Classifier(Problem(packed, bias.float(), (1, 1), relu=False))


def _problem(block: Any, dtype: torch.dtype) -> Problem:
    weight, bias = fold(block)
    conv = block.conv
    packed = pack_weight(weight.to(dtype))
    return Problem(packed, bias, conv.kernel_size, conv.stride, conv.padding)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _max_pool(module: Any) -> MaxPool | None:
    """A max pool that max_pool_out takes, or None."""
    window = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding))
    pool = MaxPool(*window, module.ceil_mode)
    fits = set(pool.kernel_size) <= {2, 3} and set(pool.stride) <= {1, 2}
    return pool if fits and module.dilation == 1 and not module.return_indices else None


def _is_convolution(conv: Any) -> bool:
    """Whether conv_group takes it."""
    return set(conv.kernel_size) <= set(_KERNEL_SIZES) and set(conv.stride) <= {1, 2}


def has_two_launches(block: Any) -> bool:
    """Whether the branches of an Inception module have the usual windows."""
    conv_3x3, conv_5x5 = block.branch2[1].conv, block.branch3[1].conv
    projection, pool = block.branch4[1].conv, _max_pool(block.branch4[0])
    r = conv_5x5.kernel_size[0]
    return (
        pool is not None
        and (pool.kernel_size, pool.stride, pool.padding) == ((3, 3), (1, 1), (1, 1))
        and _keeps_size(conv_3x3, 3)
        and r in _KERNEL_SIZES
        and _keeps_size(conv_5x5, r)
        and _keeps_size(projection, 1)
    )


def _keeps_size(conv: Any, size: int) -> bool:
    window = (conv.kernel_size, conv.stride, conv.padding)
    return window == ((size, size), (1, 1), (size // 2, size // 2))


def _stem_fits(problem: Problem) -> bool:
    """Whether the device has shared memory for the stem's kernels (sm_75: not in float32)."""
    weight = problem.weight
    if _library.device_type(weight) != "cuda":
        return True  # where launches are only planned
    return bool(_library.ops(weight).stem_fits(weight))


def _is_stem_pool(module: nn.Module) -> bool:
    return is_plain(module, nn.MaxPool2d) and _max_pool(module) == STEM_POOL


def _is_stem_conv_pool(conv: Any, pool: nn.Module) -> bool:
    return (
        is_foldable(conv)
        and conv.conv.weight.shape == (64, 3, 7, 7)
        and (conv.conv.stride, conv.conv.padding) == ((2, 2), (3, 3))
        and _is_stem_pool(pool)
    )


def _is_stem_conv_conv_pool(conv2: Any, conv3: Any, pool: nn.Module) -> bool:
    return (
        is_foldable(conv2)
        and is_foldable(conv3)
        and conv2.conv.weight.shape == (64, 64, 1, 1)
        and conv3.conv.weight.shape == (192, 64, 3, 3)
        and _keeps_size(conv2.conv, 1)
        and _keeps_size(conv3.conv, 3)
        and _is_stem_pool(pool)
    )
