"""Sizes of the windows of pools and convolutions."""

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["output_size", "pair"]


def pair(value: int | Sequence[int]) -> list[int] | None:
    """[height, width], or None for what is neither a number nor two."""
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, list | tuple) or not all(isinstance(v, int) for v in value):
        return None
    return {1: [*value, *value], 2: [*value]}.get(len(value))


def output_size(size: Any, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> Any:
    """Height or width that a convolution or a max pool gives, by torch's rule; below 1: none."""
    if not ceil_mode:
        return (size + 2 * padding - kernel) // stride + 1
    # In ceil mode the last window must start inside the input or its left padding.
    windows = (size + 2 * padding - kernel + stride - 1) // stride + 1
    return torch.sym_min(windows, (size + padding - 1) // stride + 1)
