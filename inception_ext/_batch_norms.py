"""Batch norms of torch: what the ops take of them, and whether these can stand in for them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import functional
from inception_ext._gate import why_module_reference, why_no_kernel
from inception_ext._process_group import Group, group_of

__all__ = [
    "Batch",
    "batch_norm_kind",
    "batch_norm_relu",
    "start_batch",
    "takes_batch",
    "why_batch_norm_reference",
]


def batch_norm_relu(bn: Any, x: Tensor) -> Tensor:
    """An ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm``, then ReLU."""
    if why_no_kernel(x) is not None or why_batch_norm_reference(bn) is not None:
        return F.relu(bn(x))  # not in place: backward hooks on bn forbid it, forward hooks keep x
    batch = start_batch([bn])
    assert batch is not None  # one alone counts as it does
    weights, biases, means, variances = batch.vectors
    return functional.batch_norm_relu(
        x, weights[0], biases[0], means[0], variances[0], *batch.settings
    )


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def why_batch_norm_reference(bn: Any) -> str | None:
    """Why no kernel may stand in for calling a batch norm, or None."""
    is_shared = type(bn) is nn.SyncBatchNorm
    reason = why_module_reference(bn, nn.SyncBatchNorm if is_shared else nn.BatchNorm2d)
    if reason is not None:
        return reason
    parameters, buffers = bn._parameters, bn._buffers  # attributes are slow
    if parameters.get("weight") is None or parameters.get("bias") is None:
        return "BatchNorm2d without affine parameters"
    given = [buffers.get(name) is not None for name in _STATISTICS]
    if not all(given) and (bn.track_running_stats or any(given)):
        return "BatchNorm2d without running statistics that it tracks"
    if not all(name in buffers for name in _STATISTICS):
        return "BatchNorm2d whose running statistics are no buffers"
    if bn.training and torch.compiler.is_compiling():
        if is_shared:
            return "SyncBatchNorm under torch.compile"
        if bn.momentum is None:
            return "BatchNorm2d with momentum=None under torch.compile"
    return None


def takes_batch(bn: Any) -> bool:
    """Whether a batch norm normalises by the statistics of the batch."""
    return bn.training or bn._buffers.get("running_mean") is None


def batch_norm_kind(bn: Any) -> tuple[Any, ...]:
    """What batch norms of one op must have in common."""
    has_statistics = bn._buffers.get("running_mean") is not None
    tracks = bn.track_running_stats and bn.training
    return bn.training, bn.momentum, bn.eps, has_statistics, tracks, group_of(bn)


class Batch(NamedTuple):
    """What the ops take of batch norms: their vectors, one list each, and what they share."""

    vectors: tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None]]
    settings: tuple[bool, float, float, Group]  # training, momentum, eps, group


def start_batch(bns: list[Any]) -> Batch | None:
    """Counts the batch for batch norms of one kind; None where their averages are not alike."""
    first = bns[0]
    momentum = first.momentum or 0.0
    tracks = first.training and first.track_running_stats
    if tracks:
        counters = [bn._buffers["num_batches_tracked"] for bn in bns]
        if first.momentum is None:  # a cumulative average
            counts = set(torch.stack(counters).tolist())
            if len(counts) != 1:
                return None
            momentum = 1.0 / (counts.pop() + 1)
        torch._foreach_add_(counters, 1)
    moves = tracks or not first.training  # else torch leaves running statistics alone

    def running(name: str) -> list[Tensor | None]:
        return [bn._buffers[name] if moves else None for bn in bns]

    return Batch(
        (
            [bn._parameters["weight"] for bn in bns],
            [bn._parameters["bias"] for bn in bns],
            running("running_mean"),
            running("running_var"),
        ),
        (takes_batch(first), momentum, first.eps, group_of(first)),
    )
