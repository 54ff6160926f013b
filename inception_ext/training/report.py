"""What a run says on the terminal."""

import time
from collections.abc import Mapping
from typing import Any

from inception_ext.training.network import HEADS

__all__ = ["Pace", "epoch_line", "losses_text"]


def losses_text(row: Mapping[str, Any], images_per_second: float) -> str:
    """Of a step: its losses and the pace."""
    parts = ", ".join(f"{head} {row[head]:.3f}" for head in HEADS)
    return f"loss {row['loss']:.3f} ({parts})  {images_per_second:.0f} img/s"


class Pace:
    """Seconds since the step before, and images a second, of late."""

    def __init__(self) -> None:
        self.images_per_second = self.seconds = 0.0
        self._last = time.perf_counter()

    def add(self, images: float) -> None:
        now = time.perf_counter()
        self.seconds, self._last = now - self._last, now
        current = images / max(self.seconds, 1e-9)
        before = self.images_per_second or current
        self.images_per_second = 0.9 * before + 0.1 * current


def epoch_line(facts: Mapping[str, Any], epochs: int) -> str:
    """Of an epoch: its loss, and the test of every head."""
    train = facts["train"]
    line = f"epoch {facts['epoch'] + 1}/{epochs}  train loss {train['loss']:.3f}"
    for name in ("test", "test_ema"):
        if facts[name]:
            accuracies = ", ".join(
                f"{head} {facts[name][f'accuracy_{head}']:.2%}" for head in HEADS
            )
            line += f"  {name.replace('_', ' ')} {accuracies}"
    if train["skipped"]:
        line += f"  {train['skipped']} unreadable"
    return f"{line}  {facts['seconds']:.0f} s"
