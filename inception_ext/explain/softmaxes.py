"""How good the three softmaxes are, how well they know it, and what leaving early would give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from inception_ext._blocks import Exits
from inception_ext._files import replace_file
from inception_ext.training.curves import COLOURS
from inception_ext.training.network import HEADS

__all__ = ["ORDER", "calibration", "early_exits", "measure", "render", "save_picture"]

ORDER = ("aux1", "aux2", "main")  # in which an image meets them
BINS = 15


def measure(logits: Mapping[str, Tensor], labels: Tensor, exits: Exits) -> dict[str, Any]:
    """Everything about the softmaxes of one network on one data set, as plain values.

    Args:
        logits: ``[N, num_classes]`` by head.
        labels: ``[N]``.
        exits: the work of leaving at each head.
    """
    return {
        "images": len(labels),
        "heads": {head: calibration(logits[head], labels) for head in HEADS},
        "exits": early_exits(logits, labels, exits),
        "flops": {**vars(exits)},
    }


def calibration(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy, loss, and how far confidence is from accuracy.

    ``ece`` is the expected calibration error over 15 bins of equal width (Guo et al., "On
    Calibration of Modern Neural Networks", 2017); ``bins`` holds those with images: how many, their
    mean confidence and their accuracy.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    right = (predicted == labels).double()
    bins = []
    which = (confidence * BINS).long().clamp(max=BINS - 1)
    for number in which.unique().tolist():
        inside = which == number
        bins.append(
            {
                "images": int(inside.sum()),
                "confidence": confidence[inside].mean().item(),
                "accuracy": right[inside].mean().item(),
            }
        )
    gaps = [b["images"] * abs(b["confidence"] - b["accuracy"]) for b in bins]
    return {
        "accuracy": right.mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "confidence": confidence.mean().item(),
        "ece": sum(gaps) / len(labels),
        "bins": bins,
    }


def early_exits(logits: Mapping[str, Tensor], labels: Tensor, exits: Exits) -> list[dict[str, Any]]:
    """What comes of letting images go at the first head whose confidence reaches a threshold.

    Returns:
        by threshold, from 0 to 1: ``accuracy``, ``work`` (share of the FLOPs of the network
        without auxiliary heads), and ``left``: the share of images at each head.
    """
    confidence, predicted = {}, {}
    for head in ORDER:
        confidence[head], predicted[head] = logits[head].double().softmax(1).max(1)
    right = {head: predicted[head] == labels for head in ORDER}
    cost = {head: getattr(exits, head) / exits.plain for head in ORDER}
    found = []
    for threshold in [*(i / 50 for i in range(50)), 0.99, 0.995, 0.999, 1.01]:
        at_aux1 = confidence["aux1"] >= threshold
        at_aux2 = ~at_aux1 & (confidence["aux2"] >= threshold)
        leaves = {"aux1": at_aux1, "aux2": at_aux2, "main": ~at_aux1 & ~at_aux2}
        share = {head: leaves[head].double().mean().item() for head in ORDER}
        found.append(
            {
                "threshold": threshold,
                "accuracy": sum(
                    (right[head] & leaves[head]).double().mean().item() for head in ORDER
                ),
                "work": sum(share[head] * cost[head] for head in ORDER),
                "left": share,
            }
        )
    return found


def render(result: Mapping[str, Any]) -> str:
    """Both tables."""
    lines = [
        f"{result['images']} images",
        "",
        "softmax   accuracy    loss  confidence   calibration error",
    ]
    for head in ORDER:
        own = result["heads"][head]
        lines.append(
            f"{head:8}{own['accuracy']:10.2%}{own['loss']:8.3f}{own['confidence']:12.2%}"
            f"{own['ece']:20.2%}"
        )
    lines += ["", "early exit at confidence   accuracy     work    left at aux1    aux2    main"]
    shown = (0.0, 0.5, 0.7, 0.8, 0.9, 0.96, 0.99, 0.999, 1.01)
    for row in result["exits"]:
        if row["threshold"] in shown:
            name = "never" if row["threshold"] > 1 else f"{row['threshold']:g}"
            left = "".join(f"{row['left'][head]:8.1%}" for head in ORDER)
            lines.append(f"{name:>24}{row['accuracy']:11.2%}{row['work']:9.1%}        {left}")
    lines.append("work: FLOPs, of those of the network without auxiliary heads")
    return "\n".join(lines)


def save_picture(result: Mapping[str, Any], path: Path) -> None:
    """Reliability of each softmax, and accuracy against work, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[1, 1.2])
    for column, head in enumerate(ORDER):
        axes = figure.add_subplot(grid[0, column])
        own = result["heads"][head]
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        axes.bar(
            [b["confidence"] for b in own["bins"]],
            [b["accuracy"] for b in own["bins"]],
            width=0.8 / BINS,
            color=COLOURS[head],
            alpha=0.8,
        )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_title(f"{head}: accuracy {own['accuracy']:.1%}, ECE {own['ece']:.1%}")
        axes.set_xlabel("confidence")
        if column == 0:
            axes.set_ylabel("accuracy")
    curve = figure.add_subplot(grid[1, :])
    work = [100 * row["work"] for row in result["exits"]]
    accuracy = [100 * row["accuracy"] for row in result["exits"]]
    curve.plot(work, accuracy, color=COLOURS["total"], marker=".", linewidth=1.2)
    last = None
    for row in result["exits"]:
        if row["threshold"] in (0.0, 0.5, 0.8, 0.9, 0.96, 0.99, 0.999, 1.01):
            point = (100 * row["work"], 100 * row["accuracy"])
            if last is not None and abs(point[0] - last) < 1.5:
                continue
            last = point[0]
            name = "never" if row["threshold"] > 1 else f"{row['threshold']:g}"
            curve.annotate(name, point, xytext=(4, -12), textcoords="offset points", fontsize=9)
            curve.plot(*point, color=COLOURS["aux2"], marker="o", markersize=5)
    curve.set_xlabel("work, % of the FLOPs without auxiliary heads")
    curve.set_ylabel("accuracy, %")
    curve.set_title(f"Early exit, by threshold; {result['images']} images")
    curve.grid(alpha=0.3)
    replace_file(path, lambda file: figure.savefig(file, dpi=100, format="png"))
