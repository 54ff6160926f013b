"""A frozen network on the CPU: chains of its steps, each as one op (``csrc/torch/frozen.cpp``).

The op computes what the steps of :mod:`inception_ext._frozen` do: convolutions by oneDNN, max pools
and the rest by our kernels. 3x3 convolutions go by Winograd's F(4x4, 3x3), whose matrix
products are oneDNN's as well, in float32: a quarter of the multiplications.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inception_ext import _frozen, _gate
from inception_ext._frozen import Convolution, Frozen, Inception, Pool, Step, run_in_slices
from inception_ext._packing import LEAST_TILES, Size, Weights, takes_winograd
from inception_ext._plan import CONVOLUTION, INCEPTION, POOL, pool_sizes
from inception_ext._windows import output_size, pair

__all__ = ["FrozenCpu"]


class FrozenCpu(Frozen):
    """:class:`Frozen`, where runs of known steps are one op each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stem_chains, self._body_chains = _chained(self.stem), _chained(self.body)

    def run_part(self, steps: list[Step], x: Tensor, images: int) -> Tensor:
        for chain in self._stem_chains if steps is self.stem else self._body_chains:
            x = chain(x, images)
        return x


class _Chain:
    """Steps that follow one another; as one op where ``fused``."""

    def __init__(self, steps: list[Step], fused: bool) -> None:
        self.steps, self.fused = steps, fused
        self.plans = _Plans(steps)

    def __call__(self, x: Tensor, images: int) -> Tensor:
        if not self.fused or not _takes_op(x):
            return run_in_slices(self.steps, x, images)
        plan = self.plans.find(x, images)
        return torch.ops.inception_ext.frozen_forward(
            x, plan.weights, plan.biases, plan.numbers, images
        )


def _takes_op(x: Tensor) -> bool:
    """Whether x is a plain tensor, outside of anything that traces or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and _gate.why_unavailable() is None
        and _gate.why_transformed() is None
        and type(x) is Tensor
        and x.numel() > 0
        and _frozen.has_fused_convolution(x)
    )


def _chained(steps: Sequence[Step]) -> list[_Chain]:
    """Splits steps into runs that one op takes, and those that it does not."""
    chains: list[_Chain] = []
    for step in steps:
        fused = _is_known(step)
        if chains and chains[-1].fused == fused:
            chains[-1].steps.append(step)
        else:
            chains.append(_Chain([step], fused))
    return chains


def _is_known(step: Step) -> bool:
    if isinstance(step, Inception):
        return _is_known(step.pool)
    if isinstance(step, Pool):
        return _window(step.module) is not None
    return isinstance(step, Convolution)


def _window(pool: Any) -> list[int] | None:
    """Kernel, stride, padding of a max pool, each as height and width; None: not for the op."""
    kernel, stride, padding, dilation = (
        pair(v) or [0, 0] for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    if pool.return_indices or dilation != [1, 1] or kernel[0] * kernel[1] > 255:
        return None
    if min(*kernel, *stride) < 1:
        return None
    if any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        return None
    return [*kernel, *stride, *padding]


_MOST_SHAPES = 1024
_lock = threading.Lock()  # of all plans; within an engine it would keep that from being copied

_Shape = tuple[int, int, int]  # images, height, width


class _Plans:
    """A chain's plans by the shape of its slices.

    oneDNN wants weights in another layout for small images than for large ones, and rearranges them
    in every call, by its slowest code, where they come in the wrong one. Yet making a plan takes as
    long as some images, so a shape that comes for the first time borrows the plan of larger images.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._weights = Weights()
        self._by_shape: dict[_Shape, _Plan | None] = {}  # None: came once, and borrowed

    def find(self, x: Tensor, images: int) -> "_Plan":
        """The plan for x, which goes through in slices of at most so many images."""
        images = min(images, max(1, x.shape[0] // torch.get_num_threads()))
        shape = (images, x.shape[2], x.shape[3])
        with _lock:
            is_new = shape not in self._by_shape
            plan = self._larger(*shape[1:]) if is_new else self._by_shape[shape]
            if is_new and len(self._by_shape) >= _MOST_SHAPES:
                self._by_shape = {}
            if is_new and plan is not None:
                self._by_shape[shape] = None
            if plan is None:
                self._by_shape[shape] = plan = _Plan(self._steps, shape, self._weights)
            return plan

    def _larger(self, height: int, width: int) -> "_Plan | None":
        """Of the least images that hold these: it has all of Winograd's weights that are read."""
        found = [
            (h * w, plan)
            for (_, h, w), plan in self._by_shape.items()
            if plan is not None and h >= height and w >= width
        ]
        return min(found, key=lambda pair: pair[0])[1] if found else None


class _Plan:
    """The arguments of the op for some steps and slices of one shape."""

    def __init__(self, steps: Sequence[Step], shape: _Shape, weights: Weights) -> None:
        self.numbers: list[int] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self._images, *sides = shape
        self._packed = weights
        size: Size = (sides[0], sides[1])
        with torch.no_grad():
            for step in steps:
                size = self._add(step, size)

    def _add(self, step: Any, size: Size) -> Size:
        """Appends a step that reads ``size`` pixels; returns the size of its output."""
        if isinstance(step, Convolution):
            return self._add_convolution(step, size)
        if isinstance(step, Pool):
            window = _window(step.module)
            assert window is not None
            self.numbers += [POOL, *window, int(step.module.ceil_mode)]
            return pool_sizes(size, window, step.module.ceil_mode)
        self.numbers += [INCEPTION, *step.split]
        for part in (step.merged, step.conv_3x3, step.conv_5x5, step.pool):
            self._add(part, size)
        return self._add(step.projection, size)

    def _add_convolution(self, conv: Convolution, size: Size) -> Size:
        least_tiles = LEAST_TILES[conv.weight.dtype]
        fast = takes_winograd(conv, size)
        self.numbers += [CONVOLUTION, *conv.stride, *conv.padding, least_tiles if fast else 0]
        self.weights.append(self._packed.plain(conv, self._images, size))
        if fast:
            self.weights.append(self._packed.winograd(conv))
        self.biases.append(conv.bias)
        kernel = conv.weight.shape[2:]
        h, w = (output_size(size[i], kernel[i], conv.stride[i], conv.padding[i]) for i in (0, 1))
        return h, w
