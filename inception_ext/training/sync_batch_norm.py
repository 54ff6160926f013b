"""BatchNorm over the batches of all processes, on the CPU too, where PyTorch has none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import _process_group

__all__ = ["SyncBatchNorm", "convert"]


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
        momentum = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / int(self.num_batches_tracked)
        return _process_group.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            momentum or 0.0,
            self.eps,
        )


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
