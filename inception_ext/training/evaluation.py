"""What the three softmaxes make of the test images."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from inception_ext.training.batches import Batch
from inception_ext.training.distributed import World
from inception_ext.training.network import HEADS, forward_heads

__all__ = ["evaluate"]


def evaluate(
    model: Any,
    batches: Iterable[Batch],
    world: World,
    *,
    stop: Callable[[], bool] = lambda: False,
    autocast: Callable[[], Any],
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, float] | None:
    """Loss and accuracy of every head over all images of all processes.

    Args:
        model: a GoogLeNet with heads; its mode is left as it was.
        batches: those of this process.
        stop: asked after each batch.
        autocast: makes the context of a forward pass.
        on_batch: called with each batch.

    Returns:
        ``loss_HEAD``, ``accuracy_HEAD`` for the heads, ``accuracy5_main`` and ``images``; None
        where some process was asked to stop, or no image could be read.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    sums = [0.0] * (2 * len(HEADS) + 2)
    stopped = False
    try:
        with torch.no_grad():
            for batch in batches:
                on_batch(batch)
                if len(batch):
                    values = _batch(model, batch, world, autocast)
                    sums = [a + b for a, b in zip(sums, values, strict=True)]
                if stop():
                    stopped = True
                    break
    finally:
        for module in training:
            module.training = True
    *sums, any_stopped = world.sum([*sums, float(stopped)])
    images = sums[-1]
    if any_stopped or not images:
        return None
    names = [f"{kind}_{head}" for head in HEADS for kind in ("loss", "accuracy")]
    means = [value / images for value in sums[:-1]]
    return {**dict(zip([*names, "accuracy5_main"], means, strict=True)), "images": int(images)}


def _batch(model: Any, batch: Batch, world: World, autocast: Callable[[], Any]) -> list[float]:
    images = batch.images.to(world.device, non_blocking=True)
    labels = batch.labels.to(world.device, non_blocking=True)
    with autocast():
        logits = forward_heads(model, images.contiguous(memory_format=torch.channels_last))
    sums = []
    for head in HEADS:
        scores = logits[head].float()
        sums += [
            F.cross_entropy(scores, labels, reduction="sum"),
            (scores.argmax(1) == labels).sum(),
        ]
    top = logits["main"].topk(min(5, logits["main"].shape[1])).indices
    sums.append((top == labels[:, None]).sum())
    values: list[float] = torch.stack([value.double() for value in sums]).tolist()
    return [*values, float(len(batch))]
