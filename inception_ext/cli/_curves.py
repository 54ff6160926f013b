"""The loss curves as a PNG."""

from pathlib import Path

from inception_ext.cli._training import History
from inception_ext.training.curves import COLOURS, smoothed

__all__ = ["save_loss_curves"]


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
