"""Batch norm over the batches of all processes of a group: the group, and what they exchange."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "Group", "batch_norm", "group_of", "implement"]


class Group(NamedTuple):
    """Processes that share the statistics of batch norms in training.

    name: of the process group, as ``torch.distributed`` knows it; size: how many they are, 1: the
    calling process alone, whatever the name.
    """

    name: str
    size: int


ALONE = Group("", 1)


def group_of(bn: nn.Module) -> Group:
    """With whom a batch norm shares its statistics, by the rules of ``nn.SyncBatchNorm``."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training or not _is_distributed():
        return ALONE
    process_group: Any = bn.process_group or dist.group.WORLD
    size = dist.get_world_size(process_group)
    return Group(process_group.group_name, size) if size > 1 else ALONE


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _resolve(name: Any) -> Any:
    """The process group of this name."""
    return dist.distributed_c10d._resolve_process_group(name)


# What the compiled ops call while they run.


def _size(group_name: str) -> int:
    """Of a process group; 0: there is none of this name."""
    if not _is_distributed():
        return 0
    try:
        return _resolve(group_name).size()
    except (RuntimeError, ValueError):
        return 0


def _gather(x: Tensor, group_name: str, all: Tensor) -> None:
    # Its name since torch 2.13, or the one before.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(all, x, group=_resolve(group_name))


def _add_up(parts: list[Tensor], group_name: str, sums: Tensor) -> None:
    torch.cat(parts, out=sums)
    dist.all_reduce(sums, group=_resolve(group_name))


def implement(namespace: str) -> None:
    """Gives one namespace of the ops what their kernels call."""
    for name, function in (
        ("process_group_size", _size),
        ("gather_over_group", _gather),
        ("sum_over_group", _add_up),
    ):
        torch.library.impl(f"{namespace}::{name}", "default", function)


# The same in plain PyTorch.


class _Sum(torch.autograd.Function):
    """Adds up a tensor over all processes. As every process reads the sum, its gradient is the sum
    of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: Any) -> Tensor:
        ctx.process_group = process_group
        total = x.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Sum.apply(grad, ctx.process_group), None


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: Group | None = None,
) -> Tensor:
    """``F.batch_norm`` in training over the batches of all processes, on any device.

    Args:
        x: ``[N, C, H, W]``; N may differ between processes.
        weight, bias, running_mean, running_var: ``[C]`` or None, the same in all processes.
        group: None: all processes.
    """
    process_group = None if group is None else _resolve(group.name)
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.to(dtype)
    sums = values.sum((0, 2, 3))
    count = sums.new_full((1,), x.numel() // x.shape[1])
    total: Tensor = _Sum.apply(torch.cat([sums, count]), process_group)
    n = total[-1].detach()
    mean = total[:-1] / n  # [C]
    # A second pass over x: E[x^2] - E[x]^2 would cancel.
    centred = values - mean.view(-1, 1, 1)
    var: Tensor = _Sum.apply(centred.square().sum((0, 2, 3)), process_group) / n
    with torch.no_grad():
        for running, value in ((running_mean, mean), (running_var, var * n / (n - 1))):
            if running is not None:
                running.lerp_(value.to(running.dtype), momentum)
    scale = torch.rsqrt(var + eps)
    y = centred * (scale if weight is None else scale * weight).view(-1, 1, 1)
    return (y if bias is None else y + bias.view(-1, 1, 1)).to(x.dtype)
