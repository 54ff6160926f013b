"""The steps of a network in inference, as launches of the inference ops.

A step is called with a :class:`~inception_ext._launches.Launcher` and its input; it asks the
launcher for memory, launches, and returns its output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inception_ext._images import Images
from inception_ext._launches import Launcher
from inception_ext._windows import output_size

__all__ = [
    "LRN",
    "STEM_POOL",
    "Classifier",
    "Convolution",
    "FoldedInception",
    "MaxPool",
    "Problem",
    "StemConvConvPool",
    "StemConvPool",
    "Step",
    "global_avg_pool",
]

Step = Callable[[Launcher, Any], Tensor]


class Problem(NamedTuple):
    """A convolution of conv_group."""

    weight: Tensor  # [K, ceil8(R * S * C)], packed
    bias: Tensor  # [K], float32
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    pool: bool = False
    relu: bool = True


def _launch_group(
    launch: Launcher, exact: bool, *problems: tuple[Problem, Tensor, Sequence[Tensor]]
) -> None:
    """One launch for all of them, each with its input and its outputs."""
    convs = [problem for problem, _, _ in problems]
    launch(
        "conv_group",
        [x for _, x, _ in problems],
        [conv.weight for conv in convs],
        [conv.bias for conv in convs],
        [size for conv in convs for size in conv.kernel_size],
        [size for conv in convs for size in conv.stride],
        [size for conv in convs for size in conv.padding],
        [conv.pool for conv in convs],
        [conv.relu for conv in convs],
        [len(outputs) for _, _, outputs in problems],
        exact,
        launch.workspace,
        [y for _, _, outputs in problems for y in outputs],
    )


def _pool_sizes(x: Tensor, pool: "MaxPool", sizes: Sequence[Any] | None = None) -> list[Any]:
    """Output height and width of a pool over x, or over another height and width."""
    found = [
        output_size(size, pool.kernel_size[i], pool.stride[i], pool.padding[i], pool.ceil_mode)
        for i, size in enumerate(sizes or x.shape[2:])
    ]
    for size in found:
        torch._check(size >= 1, lambda: "engine: images: Output size is too small")
    return found


@dataclass(frozen=True)
class MaxPool:
    """A max pool."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    def __call__(self, launch: Launcher, x: Tensor) -> Tensor:
        y = launch.empty(x.shape[0], x.shape[1], *_pool_sizes(x, self))
        window = (self.kernel_size, self.stride, self.padding)
        launch("max_pool_out", x, *window, self.ceil_mode, y)
        return y


STEM_POOL = MaxPool((3, 3), (2, 2), (0, 0), True)


@dataclass(frozen=True)
class Convolution:
    """Convolution + bias + ReLU, ``[N, C, H, W]`` -> ``[N, K, P, Q]``."""

    problem: Problem

    def __call__(self, launch: Launcher, x: Tensor) -> Tensor:
        conv = self.problem
        p, q = (
            (size + 2 * conv.padding[i] - conv.kernel_size[i]) // conv.stride[i] + 1
            for i, size in enumerate(x.shape[2:])
        )
        for size in (p, q):
            torch._check(size >= 1, lambda: "engine: images: smaller than a convolution's kernel")
        y = launch.empty(x.shape[0], conv.weight.shape[0], p, q)
        _launch_group(launch, launch.exact.convolutions, (conv, x, [y]))
        return y


@dataclass(frozen=True)
class StemConvPool:
    """conv1 and its pool, from the images as they are."""

    problem: Problem

    def __call__(self, launch: Launcher, images: Images) -> Tensor:
        x, conv = images.pixels, self.problem
        sizes = _pool_sizes(x, STEM_POOL, [(size + 1) // 2 for size in x.shape[2:]])
        y = launch.empty(x.shape[0], conv.weight.shape[0], *sizes)
        affine = (list(images.scale), list(images.shift))
        exact = launch.exact.convolutions
        launch("stem_conv_pool", x, conv.weight, conv.bias, *affine, exact, y)
        return y


@dataclass(frozen=True)
class StemConvConvPool:
    """conv2, conv3 and their pool."""

    conv2: Problem
    conv3: Problem

    def __call__(self, launch: Launcher, x: Tensor) -> Tensor:
        y = launch.empty(x.shape[0], self.conv3.weight.shape[0], *_pool_sizes(x, STEM_POOL))
        parameters = (self.conv2.weight, self.conv2.bias, self.conv3.weight, self.conv3.bias)
        launch("stem_conv_conv_pool", x, *parameters, launch.exact.convolutions, y)
        return y


@dataclass(frozen=True)
class LRN:
    """Local response normalisation."""

    size: int
    alpha: float
    beta: float
    k: float

    def __call__(self, launch: Launcher, x: Tensor) -> Tensor:
        y = launch.empty(*x.shape)
        launch("lrn", x, self.size, self.alpha, self.beta, self.k, y)
        return y


def global_avg_pool(launch: Launcher, x: Tensor) -> Tensor:
    """``[N, C, H, W]`` -> ``[N, C, 1, 1]``."""
    y = launch.empty(x.shape[0], x.shape[1], 1, 1)
    launch("global_avg_pool", x, y)
    return y


@dataclass(frozen=True)
class Classifier:
    """A linear layer, ``[N, C, 1, 1]`` -> ``[N, K]``: a convolution of a single pixel."""

    problem: Problem

    def __call__(self, launch: Launcher, x: Tensor) -> Tensor:
        y = launch.empty(x.shape[0], self.problem.weight.shape[0], 1, 1)
        _launch_group(launch, launch.exact.linear, (self.problem, x, [y]))
        return y[:, :, 0, 0]


class FoldedInception(NamedTuple):
    """An Inception module for inference, in two launches.

    The fields are the arguments of :func:`inception_ext.reference.folded_inception` behind x.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    widths: Sequence[int]
    branch3_kernel_size: int = 3

    def run(self, launch: Launcher, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        k1, reduced_3x3, reduced_5x5 = self.widths
        k3, k5, projection = (weight.shape[0] for weight in self.weights[1:])
        to_3x3, to_5x5 = launch.empty(n, reduced_3x3, h, w), launch.empty(n, reduced_5x5, h, w)
        y = launch.empty(n, k1 + k3 + k5 + projection, h, w)
        y1, y3 = y[:, :k1], y[:, k1 : k1 + k3]
        y5, y_pool = y[:, k1 + k3 : k1 + k3 + k5], y[:, k1 + k3 + k5 :]
        merged, conv_3x3, conv_5x5, pooled = (
            Problem(weight, bias, (size, size), padding=(size // 2, size // 2), pool=pool)
            for weight, bias, size, pool in zip(
                self.weights,
                self.biases,
                (1, 3, self.branch3_kernel_size, 1),
                (False, False, False, True),
                strict=True,
            )
        )
        exact = launch.exact.convolutions
        _launch_group(launch, exact, (merged, x, [y1, to_3x3, to_5x5]), (pooled, x, [y_pool]))
        _launch_group(launch, exact, (conv_3x3, to_3x3, [y3]), (conv_5x5, to_5x5, [y5]))
        return y
