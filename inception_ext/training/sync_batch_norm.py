"""BatchNorm over the batches of all processes, on the CPU too, where PyTorch has none."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SyncBatchNorm", "convert"]


class _Sum(torch.autograd.Function):
    """Adds up a tensor over all processes. As every process reads the sum, its gradient is the sum
    of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.BatchNorm2d):
    """As PyTorch's, on the CPU: arguments and state_dict of ``nn.BatchNorm2d``.

    Shape:
        ``[N, C, H, W]`` -> the same; N may differ between processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        sums = x.sum((0, 2, 3), dtype=dtype)
        count = sums.new_full((1,), x.numel() // x.shape[1])
        total: Tensor = _Sum.apply(torch.cat([sums, count]))
        n = total[-1].detach()
        mean = total[:-1] / n  # [C]
        # A second pass over x: E[x^2] - E[x]^2 would cancel.
        centred = x - mean.view(-1, 1, 1).to(x.dtype)
        squares = centred.square().sum((0, 2, 3), dtype=dtype)
        var: Tensor = _Sum.apply(squares) / n
        self._update(mean.detach(), var.detach() * n / (n - 1))
        scale = torch.rsqrt(var + self.eps) * self.weight
        return centred * scale.view(-1, 1, 1).to(x.dtype) + self.bias.view(-1, 1, 1).to(x.dtype)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased_var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), momentum)


def convert(model: nn.Module, device: torch.device) -> nn.Module:
    """Makes every BatchNorm2d of a model one over all processes, in place; weights stay.

    PyTorch's own on a GPU, which it asks for; :class:`SyncBatchNorm` on the CPU.
    """
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model
