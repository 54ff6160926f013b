"""The loss curves as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from inception_ext.cli._training import History

__all__ = ["save_loss_curves", "smoothed"]

COLOURS = {"total": "#222222", "main": "#1f77b4", "aux1": "#2ca02c", "aux2": "#d62728"}


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def save_loss_curves(history: History, path: Path, title: str) -> None:
    """Each loss by training step, faint, with its moving average over it."""
    from matplotlib.figure import Figure  # no pyplot: no window, no global state

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, values in history.losses.items():
        epochs = [(step + 1) / history.steps_per_epoch for step in range(len(values))]
        axes.plot(epochs, values, color=COLOURS[name], alpha=0.2, linewidth=0.8)
        axes.plot(epochs, smoothed(values), color=COLOURS[name], linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("cross entropy")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="loss")
    figure.savefig(path, dpi=120)
