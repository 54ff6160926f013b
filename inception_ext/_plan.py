"""The plan of ``frozen_forward``: what it holds, and what torch cannot see in the op.

A plan is a list of integers, a record a step, each starting with its kind, read by
``csrc/torch/frozen.cpp``. Convolutions take their weights off the op's lists in turn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inception_ext import _library
from inception_ext._windows import output_size

__all__ = ["CONVOLUTION", "INCEPTION", "POOL", "pool_sizes"]

# Stride h, w, padding h, w, and how many tiles of 4x4 an image has at least that goes by Winograd,
# whose weight then follows the plain one; 0: there is none.
CONVOLUTION = 0
POOL = 1  # kernel h, w, stride h, w, padding h, w, ceil_mode
# Channels of the three parts of the merged convolution, then the records of the merged, the 3x3 and
# the 5x5 convolution, the pool, and the projection.
INCEPTION = 2

Shape = tuple[Any, Any, Any]  # channels, height, width


def pool_sizes(size: Sequence[Any], window: Sequence[int], ceil_mode: bool) -> tuple[Any, Any]:
    """Height and width of a max pool's output; window: kernel h, w, stride h, w, padding h, w."""
    kernel, stride, padding = window[:2], window[2:4], window[4:]
    h, w = (output_size(size[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1))
    return h, w


class _Walk:
    """Follows a plan by shapes alone; ``macs`` counts multiply-accumulates of an image."""

    def __init__(self, weights: Sequence[Any], plan: Sequence[int]) -> None:
        self._weights: Iterator[Any] = iter(weights)  # shapes
        self._plan = list(plan)
        self.macs = 0

    def steps(self, shape: Shape) -> Shape:
        while self._plan:
            shape = self._step(shape)
        return shape

    def _take(self, count: int) -> list[int]:
        taken, self._plan = self._plan[:count], self._plan[count:]
        return taken

    def _step(self, shape: Shape) -> Shape:
        kind = self._take(1)[0]
        if kind == POOL:
            return self._pool(shape)
        return self._inception(shape) if kind == INCEPTION else self._convolution(shape)

    def _pool(self, shape: Shape) -> Shape:
        *window, ceil_mode = self._take(7)
        return (shape[0], *pool_sizes(shape[1:], window, bool(ceil_mode)))

    def _convolution(self, shape: Shape) -> Shape:
        *window, least_tiles = self._take(5)
        k, c, *kernel = next(self._weights)
        if least_tiles:
            next(self._weights)
        h, w = (
            output_size(size, kernel[axis], window[axis], window[2 + axis])
            for axis, size in enumerate(shape[1:])
        )
        self.macs += k * c * kernel[0] * kernel[1] * h * w
        return k, h, w

    def _inception(self, shape: Shape) -> Shape:
        k1, reduced_3x3, reduced_5x5 = self._take(3)
        _, h, w = self._step(shape)
        k3, k5 = (self._step((c, h, w))[0] for c in (reduced_3x3, reduced_5x5))
        projection = self._step(self._step(shape))[0]
        return k1 + k3 + k5 + projection, h, w


def _frozen_forward_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], plan: list[int], images: int
) -> Tensor:
    n, *shape = x.shape
    c, h, w = _Walk([weight.shape for weight in weights], plan).steps(
        (shape[0], shape[1], shape[2])
    )
    return x.new_empty((n, c, h, w)).to(memory_format=torch.channels_last)


def _frozen_forward_flop(
    x: Any, weights: list[Any], biases: Any, plan: list[int], *_: Any, **__: Any
) -> int:
    walk = _Walk(weights, plan)
    walk.steps(tuple(x[1:]))
    return int(2 * x[0] * walk.macs)


if _library.is_available():
    torch.library.register_fake("inception_ext::frozen_forward", _frozen_forward_fake)
    register_flop_formula(torch.ops.inception_ext.frozen_forward)(_frozen_forward_flop)
