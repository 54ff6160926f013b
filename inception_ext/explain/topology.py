"""The network with its three softmaxes as a picture."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inception_ext._blocks import AUXILIARY, Block, block_names, measure_blocks
from inception_ext._files import replace_file
from inception_ext._fold import is_inception
from inception_ext._fuse import fused_step

__all__ = ["launches", "save_picture"]

# Units of the drawing: a plain block is 1 high, and a branch of a module 2.2 wide.
WIDTH, COLUMN, GAP = 10.0, 2.3, 0.55
LEFT, RIGHT = -3.4, 10.4  # where the labels stand
SIDE = 16.0  # where the auxiliary heads stand

COLOURS = {
    "conv": "#cfe2f3",
    "pool": "#f4cccc",
    "norm": "#e6e6e6",
    "fc": "#d9d2e9",
    "softmax": "#fff2cc",
    "concat": "#d9ead3",
}
LAUNCH = "#c2410c"


def launches(model: Any) -> list[list[str]]:
    """The launches of ``freeze(model)`` on a GPU up to the last feature map, in order.

    Each is a list of blocks; a module of two launches is ``NAME.1`` and ``NAME.2``.
    """
    names = block_names(model)
    found: list[list[str]] = []
    while names:
        modules = [getattr(model, name) for name in names[:3]]
        for number in (3, 2, 1):
            if number > len(modules):
                continue
            step = fused_step(modules[:number], not found, torch.float32)
            if step is not None and is_inception(modules[0]):
                found += [[f"{names[0]}.1"], [f"{names[0]}.2"]]
            elif step is not None:
                found.append(names[:number])
            elif number == 1:  # called as it is
                found.append(names[:1])
            else:
                continue
            del names[:number]
            break
    return found


def count(value: float) -> str:
    """1234567 as "1.23 M", 12 as "12 "."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g} "


class Drawing:
    """Boxes, arrows and outlines on matplotlib axes; y grows downwards."""

    def __init__(self, axes: Any) -> None:
        self.axes = axes

    def box(
        self, x: float, y: float, w: float, h: float, text: str, kind: str, dashed: bool = False
    ) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0,rounding_size=0.12"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                w,
                h,
                boxstyle=style,
                facecolor=COLOURS[kind],
                edgecolor="#444444",
                linewidth=0.8,
                linestyle="--" if dashed else "-",
                zorder=3,
            )
        )
        self.axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, zorder=4)

    def outline(self, x: float, y: float, w: float, h: float) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = "round,pad=0.12,rounding_size=0.15"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                w,
                h,
                boxstyle=style,
                fill=False,
                edgecolor=LAUNCH,
                linewidth=1.6,
                zorder=2,
            )
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        xs, ys = zip(*points, strict=True)
        self.axes.plot(xs[:-1], ys[:-1], color="#444444", linewidth=0.9, zorder=1)
        self.axes.annotate(
            "",
            xy=points[-1],
            xytext=points[-2],
            arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 0.9},
            zorder=1,
        )

    def label(self, x: float, y: float, text: str, **style: Any) -> None:
        self.axes.text(x, y, text, va="center", **{"fontsize": 8, **style})


def save_picture(model: Any, size: int, paths: Sequence[Path]) -> dict[str, Block]:
    """Draws a GoogLeNet for images of ``size`` x ``size``.

    Args:
        paths: files to write; their endings (.svg, .png) say how.

    Returns:
        the blocks with the numbers in the picture.
    """
    from matplotlib.figure import Figure

    blocks = measure_blocks(model, size)
    groups = launches(model)
    heights = {name: _height(getattr(model, name)) for name in block_names(model)}
    total = sum(heights.values()) + GAP * (len(heights) + 4) + 3.6
    figure = Figure(figsize=(12, total * 0.42), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(LEFT - 0.3, SIDE + 4.6)
    axes.set_ylim(total, -1.6)
    _draw(Drawing(axes), model, blocks, groups, size)
    for path in paths:
        replace_file(path, partial(figure.savefig, dpi=90, format=path.suffix.lstrip(".")))
    return blocks


def _height(module: nn.Module) -> float:
    return 3.6 if hasattr(module, "branch4") else 1.0


def _draw(
    draw: Drawing, model: Any, blocks: dict[str, Block], groups: list[list[str]], size: int
) -> None:
    names = block_names(model)
    parameters = sum(block.parameters for block in blocks.values())
    heads = [blocks[head] for head in AUXILIARY.values() if head in blocks]
    dropped = sum(block.flops for block in heads)
    flops = sum(block.flops for block in blocks.values()) - dropped
    draw.label(
        LEFT,
        -1.1,
        f"{type(model).__name__}, {size} x {size}: {count(parameters).strip()} parameters, "
        f"{count(flops)}FLOP an image in inference (two a multiply-accumulate); heads: "
        f"{count(dropped)}FLOP more",
        fontsize=11,
        weight="bold",
    )
    draw.axes.plot([LEFT, LEFT + 0.8], [-0.45, -0.45], color=LAUNCH, linewidth=1.6)
    draw.label(
        LEFT + 1.0,
        -0.45,
        "outlined: one launch of freeze(model) on a GPU.  dashed: in training only",
        fontsize=9,
    )
    y, middle = 0.0, WIDTH / 2
    tops: dict[str, float] = {}
    draw.box(middle - 1.6, y, 3.2, 0.7, f"images 3 x {size} x {size}", "norm")
    previous = y + 0.7
    y = previous + GAP
    for name in names:
        module = getattr(model, name)
        height = _height(module)
        tops[name] = y
        draw.arrow((middle, previous), (middle, y))
        if height > 1:
            _draw_inception(draw, module, y)
            if [f"{name}.1"] in groups:
                draw.outline(0.25, y + 0.25, WIDTH - 0.5, 1.1)
                draw.outline(0.25 + COLUMN + 0.08, y + 1.75, 2 * COLUMN - 0.1, 0.75)
        else:
            draw.box(2.5, y, 5, 1.0, _describe(module), _kind(module))
        _label_block(draw, blocks[name], y + height / 2)
        if name in AUXILIARY and AUXILIARY[name] in blocks:
            _draw_auxiliary(draw, model, blocks[AUXILIARY[name]], y + height + GAP / 2)
            draw.arrow((middle, y + height + GAP / 2), (SIDE, y + height + GAP / 2))
        previous = y + height
        y = previous + GAP
    for group in groups:
        if "." not in group[0] and _height(getattr(model, group[0])) == 1:
            top, bottom = tops[group[0]], tops[group[-1]] + 1
            draw.outline(2.5, top, 5, bottom - top)
    for text, kind, block in (
        ("average over the map, dropout", "pool", blocks["avgpool"]),
        (f"linear, {blocks['fc'].shape[0]}", "fc", blocks["fc"]),
        ("softmax: main", "softmax", None),
    ):
        draw.arrow((middle, previous), (middle, y))
        draw.box(2.5, y, 5, 0.9, text, kind)
        if block is not None:
            draw.outline(2.5, y, 5, 0.9)
            _label_block(draw, block, y + 0.45)
        previous = y + 0.9
        y = previous + GAP


def _label_block(draw: Drawing, block: Block, y: float) -> None:
    shape = " x ".join(map(str, block.shape))
    draw.label(LEFT, y - 0.16, block.name, weight="bold", fontsize=9)
    draw.label(LEFT, y + 0.24, shape)
    draw.label(RIGHT, y - 0.16, f"{count(block.parameters).strip()} parameters")
    draw.label(RIGHT, y + 0.24, f"{count(block.flops)}FLOP")


def _window(module: Any) -> str:
    size, stride = module.kernel_size, module.stride
    size = size[0] if isinstance(size, tuple) else size
    stride = stride[0] if isinstance(stride, tuple) else stride
    return f"{size}x{size}" + (f"/{stride}" if stride != 1 else "")


def _describe(module: Any) -> str:
    if hasattr(module, "conv"):
        return f"conv {_window(module.conv)}, {module.conv.out_channels}"
    if isinstance(module, nn.MaxPool2d):
        return f"max pool {_window(module)}"
    return (
        "local response norm" if isinstance(module, nn.LocalResponseNorm) else type(module).__name__
    )


def _kind(module: Any) -> str:
    if hasattr(module, "conv"):
        return "conv"
    return "pool" if isinstance(module, nn.MaxPool2d) else "norm"


def _draw_inception(draw: Drawing, module: Any, y: float) -> None:
    """Four branches side by side, a concatenation below them."""

    def text(block: Any) -> str:
        return f"{_window(block.conv)}, {block.conv.out_channels}"

    branches = (module.branch1, module.branch2, module.branch3, module.branch4)
    top, second, concat = y + 0.35, y + 1.8, y + 3.0
    for column, branch in enumerate(branches):
        x = 0.35 + column * (COLUMN + 0.05)
        middle = x + COLUMN / 2 - 0.1
        draw.arrow((WIDTH / 2, y), (middle, y + 0.12), (middle, top))
        width = COLUMN - 0.2
        bottom = top + 0.9
        if column == 0:
            draw.box(x, top, width, 0.9, text(branch), "conv")
        elif column == 3:
            draw.box(x, top, width, 0.42, f"max pool {_window(branch[0])}", "pool")
            draw.box(x, top + 0.48, width, 0.42, text(branch[1]), "conv")
        else:
            draw.box(x, top, width, 0.9, text(branch[0]), "conv")
            draw.arrow((middle, bottom), (middle, second))
            draw.box(x, second, width, 0.65, text(branch[1]), "conv")
            bottom = second + 0.65
        draw.arrow((middle, bottom), (middle, concat))
    draw.box(0.35, concat, WIDTH - 0.9, 0.6, "concatenated channels", "concat")


def _draw_auxiliary(draw: Drawing, model: Any, block: Block, y: float) -> None:
    """A head beside the trunk, from its pool to its softmax."""
    head = getattr(model, block.name)
    x, width = SIDE, 3.6
    rows = (
        ("average pool to 4x4", "pool"),
        (f"conv 1x1, {head.conv.conv.out_channels}", "conv"),
        (f"linear, {head.fc1.out_features}, dropout", "fc"),
        (f"linear, {block.shape[0]}", "fc"),
        (f"softmax: {block.name}", "softmax"),
    )
    top = y - 0.3
    for number, (text, kind) in enumerate(rows):
        draw.box(x, top + number * 0.95, width, 0.6, text, kind, dashed=True)
        if number:
            draw.arrow(
                (x + width / 2, top + number * 0.95 - 0.35), (x + width / 2, top + number * 0.95)
            )
    below = top + len(rows) * 0.95 + 0.05
    draw.label(x, below, f"{count(block.parameters).strip()} parameters, {count(block.flops)}FLOP")
