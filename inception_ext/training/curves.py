"""Losses, accuracies and learning rate of a run as a PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inception_ext._console import require
from inception_ext._files import replace_file
from inception_ext.training.network import HEADS

__all__ = ["COLOURS", "save_curves", "smoothed"]

COLOURS = {"total": "#222222", "main": "#1f77b4", "aux1": "#2ca02c", "aux2": "#d62728"}


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def save_curves(
    path: Path,
    steps: Sequence[Mapping[str, Any]],
    epochs: Sequence[Mapping[str, Any]],
    steps_per_epoch: int,
    title: str,
) -> None:
    """Three panels over the epochs: the three losses, the three accuracies, the learning rate.

    Args:
        path: of the PNG.
        steps: as :func:`.metrics.read_steps` gives them.
        epochs: facts about each finished epoch.

    Raises:
        CommandError: matplotlib is missing, or the file cannot be written.
    """
    require("train", matplotlib="matplotlib")
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(9, 9), layout="constrained")
    losses, accuracies, rates = figure.subplots(
        3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1]}
    )
    x = [(row["step"] + 1) / steps_per_epoch for row in steps]
    for head in HEADS:
        colour = COLOURS[head]
        values = [row[head] for row in steps]
        losses.plot(x, values, color=colour, alpha=0.2, linewidth=0.8)
        losses.plot(x, smoothed(values), color=colour, linewidth=1.6, label=head)
        batch = smoothed([100 * row[f"accuracy_{head}"] for row in steps])
        accuracies.plot(x, batch, color=colour, alpha=0.35, linewidth=1)
        tested = [epoch for epoch in epochs if epoch["test"]]
        accuracies.plot(
            [epoch["epoch"] + 1 for epoch in tested],
            [100 * epoch["test"][f"accuracy_{head}"] for epoch in tested],
            color=colour,
            marker="o",
            markersize=4,
            label=head,
        )
    losses.set_yscale("log")
    losses.set_ylabel("cross entropy of a batch")
    losses.legend(title="softmax")
    accuracies.set_ylabel("accuracy, %")
    accuracies.set_ylim(0, 101)
    accuracies.legend(title="test (faint: batches)", loc="lower right")
    rates.plot(x, [row["lr"] for row in steps], color="#222222", linewidth=1.2)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    for axes in (losses, accuracies, rates):
        axes.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    replace_file(path, lambda file: figure.savefig(file, dpi=110, format="png"))
