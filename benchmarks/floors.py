"""How fast the network can be at best: FLOPs, bytes through device memory, and the time they take.

    python benchmarks/floors.py
    python benchmarks/floors.py --batch 1 64 --size 299 --variant bvlc

The model is run once without memory (on torch's meta device) for the shapes of its layers; nothing
here is a list of numbers. A *schedule* says what runs together, and so which activations go through
memory; weights are read once a batch. A schedule is a chain of stages, of which each waits for the
one before and takes at least the longer of its FLOPs and its bytes at the rates of a device.

Bytes are those of an image. What they leave out: a launch's own time, which at batch 1 is more than
all of this, and reads that a cache serves, by which a real kernel may even be faster.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import markdown
import torch
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(
        1, str(Path(__file__).resolve().parent.parent)
    )  # an inception_ext not installed

__all__ = [
    "H100",
    "SCHEDULES",
    "Layer",
    "Roof",
    "Stage",
    "network",
    "seconds",
    "stages",
    "total",
    "trace",
]


class Layer(NamedTuple):
    """A layer that has a kernel, with the elements of an image that it reads and writes."""

    name: str  # such as inception3a.branch2.0
    kind: str  # conv, max_pool, avg_pool, lrn, linear
    x: int
    y: int
    flops: int  # two a multiply-accumulate
    weights: int
    normed: bool = False  # a batch norm follows

    @property
    def part(self) -> str:
        """The child of the network that it belongs to."""
        return self.name.partition(".")[0]

    @property
    def place(self) -> str:
        """Where it is in its part, such as branch2.0."""
        return self.name.partition(".")[2]


class Stage(NamedTuple):
    """What waits for the stage before it: ``bytes`` of activations and ``flops`` are an image's."""

    name: str
    launches: int
    flops: int
    bytes: int
    weight_bytes: int


class Roof(NamedTuple):
    """What a device does in a second, at best."""

    name: str
    flops: float
    bytes: float


# 16-bit products on tensor cores, as large matrix products reach them: by wgmma, and by mma.sync,
# which feeds the tensor cores of this generation at about 60 %. The bandwidth is what copies reach.
H100 = (Roof("H100, wgmma", 790e12, 3.0e12), Roof("H100, mma.sync", 490e12, 3.0e12))


_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "conv",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveAvgPool2d: "avg_pool",
    nn.LocalResponseNorm: "lrn",
    nn.Linear: "linear",
}


def trace(model: nn.Module, size: int = 224) -> list[Layer]:
    """The layers that run in evaluation mode, in the order of their calls.

    Args:
        model: a GoogLeNet, or one of its blocks that reads 3 channels; it stays as it is.
        size: height and width of the image.
    """
    model = copy.deepcopy(model).to("meta").eval()
    layers: list[Layer] = []
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]

    def watch(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            layers.append(_layer(name, module, args[0], y, norms))

        module.register_forward_hook(hook)  # by which the plain PyTorch path is taken, too

    for name, module in model.named_modules():
        if type(module) in _KINDS:
            watch(name, module)
    with torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return layers


def _layer(name: str, module: nn.Module, x: Tensor, y: Tensor, norms: Sequence[str]) -> Layer:
    weight = getattr(module, "weight", None)
    weights = flops = 0
    if isinstance(weight, Tensor):
        weights = weight.numel() + weight.shape[0]  # a bias, its own or that of a folded batch norm
        flops = 2 * y.numel() * weight[0].numel()
    normed = f"{name.removesuffix('.conv')}.bn" in norms
    short = name.removesuffix(".conv")
    return Layer(short, _KINDS[type(module)], x.numel(), y.numel(), flops, weights, normed)


# Schedules: each takes a part's layers to stages. Sizes are in elements until `stages` scales them;
# eager's pool indices are int64, which is why it is told the size of an element.


def _eager(part: Sequence[Layer], element_size: int) -> list[Stage]:
    """Every operation on its own, as torch's eager mode runs them."""
    launches, elements = 0, 0
    for layer in part:
        x, y = layer.x, layer.y
        if layer.kind == "conv":  # convolution; batch norm; ReLU
            launches += 3 if layer.normed else 2
            elements += x + y + (4 if layer.normed else 2) * y
        elif layer.kind == "max_pool":
            launches += 1
            elements += x + y + y * (8 // element_size)
        elif layer.kind == "lrn":  # square, pad, average, * alpha + k, power, quotient
            launches += 7
            elements += 15 * x
        else:
            launches += 1
            elements += x + y
    branches = [layer.y for layer in part if layer.place in _LAST_OF_BRANCHES]
    if branches:  # the concatenation
        launches += 1
        elements += 2 * sum(branches)
    return [_stage(part, launches, elements)]


def _fused(part: Sequence[Layer], element_size: int) -> list[Stage]:
    """Convolution + batch norm + ReLU is one kernel, and writes its slice of the concatenation."""
    return [_stage(part, len(part), sum(layer.x + layer.y for layer in part))]


def _merged(part: Sequence[Layer], element_size: int) -> list[Stage]:
    """Besides, the three 1x1 convolutions that read a module's input are one."""
    again = [layer for layer in part if layer.place in ("branch2.0", "branch3.0")]
    elements = sum(layer.x + layer.y for layer in part) - sum(layer.x for layer in again)
    return [_stage(part, len(part) - len(again), elements)]


def _two_launches(part: Sequence[Layer], element_size: int) -> list[Stage]:
    """A module is two kernels: all that reads its input; then the 3x3 and the 5x5 branch."""
    if len(part) == 1:
        return _fused(part, element_size)
    second = [layer for layer in part if layer.place in ("branch2.1", "branch3.1")]
    first = [layer for layer in part if layer not in second]
    written = sum(layer.y for layer in first if layer.kind == "conv")
    return [
        _stage(first, 1, first[0].x + written),
        _stage(second, 1, sum(layer.x + layer.y for layer in second)),
    ]


def _on_chip(part: Sequence[Layer], element_size: int) -> list[Stage]:
    """A module is one kernel, which reads its input once and writes its output."""
    return [_stage(part, 1, part[0].x + _output(part))]


def _stage(part: Sequence[Layer], launches: int, elements: int) -> Stage:
    flops = sum(layer.flops for layer in part)
    return Stage(part[0].part, launches, flops, elements, sum(layer.weights for layer in part))


_LAST_OF_BRANCHES = ("branch1", "branch2.1", "branch3.1", "branch4.1")


def _output(part: Sequence[Layer]) -> int:
    """Elements of what a part returns."""
    return sum(x.y for x in part if x.place in _LAST_OF_BRANCHES) or part[-1].y


# What reads a part's only output may run with it: the stem in two kernels, the later pools in those
# of the modules before them.
_STEM = (("conv1", "maxpool1"), ("conv2", "conv3", "maxpool2"))
_POOLED = (("inception3b", "maxpool3"), ("inception4e", "maxpool4"))

Schedule = tuple[Callable[[Sequence[Layer], int], list[Stage]], tuple[tuple[str, ...], ...], str]
SCHEDULES: dict[str, Schedule] = {
    "eager": (_eager, (), "convolution, batch norm, ReLU, concatenation, int64 pool indices"),
    "fused": (_fused, (), "every convolution + batch norm + ReLU fused, no concatenation"),
    "merged": (_merged, (), "and the three 1x1 convolutions of a module merged"),
    "engine": (_two_launches, _STEM, "a module in two launches, the stem in two (freeze on CUDA)"),
    "modules on chip": (_on_chip, (), "a module in one launch, nothing of it in memory"),
    "all fused": (_on_chip, _STEM + _POOLED, "and the stem and the pools fused"),
}


def stages(layers: Iterable[Layer], schedule: str, element_size: int = 2) -> list[Stage]:
    """The stages of some layers of :func:`trace`.

    Args:
        schedule: a key of SCHEDULES.
        element_size: bytes of an activation or a weight.
    """
    split, together, _ = SCHEDULES[schedule]
    parts = [list(part) for _, part in groupby(layers, key=lambda layer: layer.part)]
    found: list[Stage] = []
    while parts:
        group = _group(parts, together)
        if len(group) == 1:
            found += split(group[0], element_size)
        else:
            read, written = group[0][0].x, _output(group[-1])
            found.append(_stage([layer for part in group for layer in part], 1, read + written))
        del parts[: len(group)]
    return [
        stage._replace(
            bytes=stage.bytes * element_size, weight_bytes=stage.weight_bytes * element_size
        )
        for stage in found
    ]


def _group(
    parts: Sequence[Sequence[Layer]], together: Sequence[Sequence[str]]
) -> Sequence[Sequence[Layer]]:
    """The first parts, as many as run together."""
    for names in together:
        if [part[0].part for part in parts[: len(names)]] == list(names):
            return parts[: len(names)]
    return parts[:1]


def total(chain: Iterable[Stage], name: str = "total") -> Stage:
    """All stages added up."""
    _, *sums = zip(*chain, strict=True)
    return Stage(name, *(sum(column) for column in sums))


def seconds(chain: Iterable[Stage], batch: int, roof: Roof) -> float:
    """The least time that a batch takes."""
    return sum(
        max(
            batch * stage.flops / roof.flops,
            (batch * stage.bytes + stage.weight_bytes) / roof.bytes,
        )
        for stage in chain
    )


def network(variant: str = "torchvision") -> nn.Module:
    """GoogLeNet without auxiliary heads, on the meta device; ``variant``: torchvision or bvlc."""
    import inception_ext

    with torch.device("meta"):
        if variant == "bvlc":
            return inception_ext.bvlc_googlenet(aux_logits=False, init_weights=False)
        return inception_ext.googlenet(aux_logits=False, init_weights=False)


def render(model: nn.Module, batches: Sequence[int], size: int, element_size: int) -> str:
    """Everything as markdown."""
    layers = trace(model, size)
    chains = {name: stages(layers, name, element_size) for name in SCHEDULES}
    sums = {name: total(chain) for name, chain in chains.items()}
    flops = sum(layer.flops for layer in layers)
    parameters = sum(p.numel() for p in model.parameters())
    text = [f"{flops / 1e9:.3f} GFLOP an image, {parameters / 1e6:.2f} M parameters.\n"]
    text.append(
        markdown.table(
            ("schedule", "launches", "MB an image", "what runs together"),
            [
                (name, str(s.launches), f"{s.bytes / 1e6:.1f}", SCHEDULES[name][2])
                for name, s in sums.items()
            ],
            words=(0, 3),
        )
    )
    parts = list(dict.fromkeys(layer.part for layer in layers))
    rows = []
    for part in parts:
        of_part = [layer for layer in layers if layer.part == part]
        kilobytes = [total(stages(of_part, name, element_size)).bytes / 1e3 for name in SCHEDULES]
        share = sum(layer.flops for layer in of_part) / flops
        rows.append((part, f"{100 * share:.1f}", *(f"{kb:.0f}" for kb in kilobytes)))
    text.append("\nKB an image, by part, and what runs across parts left out:\n")
    text.append(markdown.table(("part", "% of FLOPs", *SCHEDULES), rows))
    text.append(f"\nMicroseconds a batch at best ({' | '.join(roof.name for roof in H100)}):\n")
    rows = []
    for batch in batches:
        cells = [f"{batch * flops / roof.flops * 1e6:.1f}" for roof in H100]
        row = [" / ".join(cells)]
        for chain in chains.values():
            row.append(" / ".join(f"{seconds(chain, batch, roof) * 1e6:.1f}" for roof in H100))
        rows.append((str(batch), *row))
    text.append(markdown.table(("batch", "FLOPs only", *SCHEDULES), rows))
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128, 256])
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--variant", choices=("torchvision", "bvlc"), default="torchvision")
    parser.add_argument("--element-size", type=int, choices=(2, 4), default=2, help="bytes")
    args = parser.parse_args(argv)
    print(render(network(args.variant), args.batch, args.size, args.element_size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
