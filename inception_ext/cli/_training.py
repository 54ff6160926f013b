"""Trains a GoogLeNet with both auxiliary heads, and asks all three heads for their opinion."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inception_ext._console import Progress
from inception_ext.googlenet import GoogLeNet
from inception_ext.losses import GoogLeNetLoss

__all__ = ["HEADS", "History", "Recipe", "head_logits", "train"]

HEADS = ("main", "aux1", "aux2")


@dataclass(frozen=True)
class Recipe:
    """AdamW under a one-cycle schedule: the learning rate rises for a quarter of all steps to
    ``learning_rate`` and falls from there to nothing."""

    epochs: int = 8
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
                outputs = model(images[chosen])
                loss = criterion(outputs, labels[chosen])
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    heads = (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)
                    parts = [criterion.criterion(head, labels[chosen]) for head in heads]
                for name, value in zip(("total", *HEADS), (loss, *parts), strict=True):
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


def head_logits(model: GoogLeNet, images: Tensor, *, batch_size: int = 120) -> dict[str, Tensor]:
    """Logits ``[N, num_classes]`` of all three heads in eval mode, by the names in HEADS.

    In eval mode a GoogLeNet runs its main head only: hooks catch what the others would read.
    """
    assert model.aux1 is not None and model.aux2 is not None
    caught: dict[str, Tensor] = {}

    def catch(name: str, block: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            caught[name] = output

        return block.register_forward_hook(hook)

    handles = [catch("aux1", model.inception4a), catch("aux2", model.inception4d)]
    training = model.training
    model.eval()
    logits: dict[str, list[Tensor]] = {name: [] for name in HEADS}
    try:
        with torch.no_grad():
            for part in images.split(batch_size):
                logits["main"].append(model(part))
                logits["aux1"].append(model.aux1(caught["aux1"]))
                logits["aux2"].append(model.aux2(caught["aux2"]))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in logits.items()}
