"""The floor model for a training step: forward and backward, without optimizer and auxiliary heads.

Counted in passes over the elements of each layer's input x and output y; batch norm needs the
statistics of the whole batch, so that what a convolution has written is read again. FLOPs are three
times those of the forward pass, but for the gradient of the images, which nobody asks for.
"""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from floors import Layer, Stage

__all__ = ["SCHEDULES", "stages"]


class Passes(NamedTuple):
    """Passes of a convolution + batch norm + ReLU over its x and its y, forward and backward."""

    x: int
    y: int
    about: str


# Every schedule: the convolution reads x and writes y; dgrad reads y's gradient and writes x's;
# wgrad reads x and y's gradient. That is 3 x + 3 y. On top of it, for batch norm and ReLU:
SCHEDULES = {
    # Forward: statistics 1, normalise 2, ReLU in place 2. Backward: ReLU 3, batch norm 5.
    "eager": Passes(3, 3 + 13, "every operation on its own, concatenation, int64 pool indices"),
    # Forward: statistics 1, normalise and ReLU 2. Backward: sums 2, gradient 3.
    "compiled": Passes(3, 3 + 8, "batch norm + ReLU fused, no concatenation, int8 pool indices"),
    # Statistics in the convolution's epilogue, normalised where it is read next. Backward: sums 2;
    # dgrad and wgrad each read what was written as well, to form the gradient on load.
    "fused": Passes(
        3, 3 + 4, "statistics in the epilogue, batch norm on load, x read once a module"
    ),
}

_INDEX_BYTES = {"eager": 8, "compiled": 1, "fused": 1}


def stages(layers: Iterable[Layer], schedule: str, element_size: int = 2) -> list[Stage]:
    """One stage a part of the network, forward and backward together.

    Args:
        layers: of :func:`floors.trace`.
        schedule: a key of SCHEDULES.
        element_size: bytes of an activation, a gradient or a weight.
    """
    found = []
    for name, group in groupby(layers, key=lambda layer: layer.part):
        part = list(group)
        bytes_ = element_size * _elements(part, schedule) + _indices(part, schedule)
        flops = sum(_flops(layer) for layer in part)
        weights = 3 * sum(layer.weights for layer in part) * element_size  # read twice, written
        found.append(Stage(name, 0, flops, bytes_, weights))
    return found


def _flops(layer: Layer) -> int:
    return (2 if layer.name == "conv1" else 3) * layer.flops


def _elements(part: Sequence[Layer], schedule: str) -> int:
    """Elements of activations and gradients that are read or written."""
    passes = SCHEDULES[schedule]
    elements = 0
    for layer in part:
        if layer.kind == "conv":
            elements += passes.x * layer.x + passes.y * layer.y
        else:  # forward x and y, backward both gradients
            elements += 2 * (layer.x + layer.y)
        if layer.name == "conv1":
            elements -= layer.x  # no gradient of the images
    branches = {layer.place: layer for layer in part}
    if "branch1" not in branches:
        return elements
    x = branches["branch1"].x
    if schedule == "eager":
        output = sum(
            branches[name].y for name in ("branch1", "branch2.1", "branch3.1", "branch4.1")
        )
        elements += 2 * output + 3 * 3 * x  # the concatenation; three sums of gradients of x
    elif schedule == "compiled":
        elements += 5 * x  # four gradients of x into one
    else:
        # The merged 1x1 convolutions read x once, forward and in wgrad, and write one gradient;
        # the pooled x and its gradient stay on chip, and theirs is added to it.
        pool = branches["branch4.0"]
        elements -= 3 * 2 * x
        elements -= 2 * (pool.x + pool.y)  # as a kernel of its own
        elements += pool.x  # its forward pass reads x beside the merged convolutions
        elements -= 3 * branches["branch4.1"].x  # pooled x is no tensor, nor is its gradient
    return elements


def _indices(part: Sequence[Layer], schedule: str) -> int:
    """Bytes of the max pools' indices: written forward, read backward."""
    windows = sum(layer.y for layer in part if layer.kind == "max_pool")
    return 2 * windows * _INDEX_BYTES[schedule]
