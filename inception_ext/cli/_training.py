"""Trains a GoogLeNet with both auxiliary heads, and asks all three heads for their opinion."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inception_ext._console import Progress
from inception_ext.googlenet import GoogLeNet
from inception_ext.losses import GoogLeNetLoss
from inception_ext.training.network import HEADS, forward_heads

__all__ = ["HEADS", "History", "Recipe", "head_logits", "train"]


@dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle schedule: the learning rate rises for a quarter of all steps to
    ``learning_rate`` and falls from there to nothing."""

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05


@dataclass
class History:
    """Losses of every step, by name, and the steps of an epoch."""

    steps_per_epoch: int
    losses: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in ("total", *HEADS)}
    )
    seconds: float = 0.0

    def epoch_means(self, epoch: int) -> dict[str, float]:
        """Mean loss of an epoch, counted from 0."""
        steps = slice(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        return {name: sum(x[steps]) / len(x[steps]) for name, x in self.losses.items()}


def train(
    model: GoogLeNet, images: Tensor, labels: Tensor, recipe: Recipe, *, seed: int
) -> History:
    """Trains in place, on full batches only, in a seeded order.

    Args:
        images: ``[N, 3, H, W]``.
        labels: ``[N]``.
    """
    batch = min(recipe.batch_size, len(labels))
    history = History(steps_per_epoch=len(labels) // batch)
    steps = recipe.epochs * history.steps_per_epoch
    criterion = GoogLeNetLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.25
    )
    order = torch.Generator().manual_seed(seed)
    model.train()
    start = time.perf_counter()
    with Progress(steps, "training") as progress:
        for epoch in range(recipe.epochs):
            for chosen in torch.randperm(len(labels), generator=order).split(batch):
                if len(chosen) < batch:
                    continue
                optimizer.zero_grad(set_to_none=True)
                parts = criterion.parts(model(images[chosen]), labels[chosen])
                loss = parts["main"] + criterion.aux_weight * (parts["aux1"] + parts["aux2"])
                loss.backward()
                optimizer.step()
                schedule.step()
                for name, value in {"total": loss, **parts}.items():
                    history.losses[name].append(value.item())
                progress.step(f"loss {loss.item():.3f}")
            means = history.epoch_means(epoch)
            parts_text = ", ".join(f"{name} {means[name]:.3f}" for name in HEADS)
            progress.line(
                f"  epoch {epoch + 1:2}/{recipe.epochs}  loss {means['total']:.3f} ({parts_text})"
                f"  {time.perf_counter() - start:.0f} s"
            )
    history.seconds = time.perf_counter() - start
    return history


@torch.no_grad()
def head_logits(model: GoogLeNet, images: Tensor, *, batch_size: int = 120) -> dict[str, Tensor]:
    """Logits ``[N, num_classes]`` of all three heads in eval mode, by the names in HEADS."""
    training = model.training
    model.eval()
    try:
        parts = [forward_heads(model, part) for part in images.split(batch_size)]
    finally:
        model.train(training)
    return {name: torch.cat([part[name] for part in parts]) for name in HEADS}
