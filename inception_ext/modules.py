"""The building blocks of GoogLeNet, with torchvision's constructors, names and state_dict keys."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import reference

__all__ = ["BasicConv2d", "Inception", "InceptionAux"]


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        **kwargs: passed on to ``nn.Conv2d`` (``kernel_size`` is required).

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, out_channels, P, Q]``, any floating dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """Four parallel branches over one input, concatenated along the channels.

    ============  ===========================================
    ``branch1``   1x1 to ``ch1x1``
    ``branch2``   1x1 to ``ch3x3red``, then 3x3 to ``ch3x3``
    ``branch3``   1x1 to ``ch5x5red``, then 3x3 to ``ch5x5``
    ``branch4``   3x3 max pool, then 1x1 to ``pool_proj``
    ============  ===========================================

    torchvision, and the weights that it publishes, have a 3x3 convolution in the "5x5" branch.
    That is the default here too; ``branch3_kernel_size=5`` is the module of the 2014 paper.

    Args:
        in_channels: channels of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: widths, see the table.
        conv_block: called as ``conv_block(in_channels, out_channels, **conv_kwargs)`` for each
            convolution; default :class:`BasicConv2d`.
        branch3_kernel_size: 3 or 5; the padding follows.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]``.

    Raises:
        ValueError: ``branch3_kernel_size`` is neither 3 nor 5.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., nn.Module] | None = None,
        *,
        branch3_kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if branch3_kernel_size not in (3, 5):
            raise ValueError(
                f"branch3_kernel_size should be 3 or 5 instead of {branch3_kernel_size}"
            )
        conv = BasicConv2d if conv_block is None else conv_block

        self.branch1 = conv(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv(in_channels, ch3x3red, kernel_size=1),
            conv(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, kernel_size=1),
            conv(
                ch5x5red,
                ch5x5,
                kernel_size=branch3_kernel_size,
                padding=branch3_kernel_size // 2,
            ),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        """The four branch outputs, before the concatenation."""
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self._forward(x), 1)


class InceptionAux(nn.Module):
    """Auxiliary classifier: average pool to 4x4, 1x1 convolution, two linear layers.

    Args:
        in_channels: channels of the input.
        num_classes: width of the output.
        conv_block: as in :class:`Inception`.
        dropout: probability of zeroing a unit between the two linear layers.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, num_classes]``, any H and W.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: Callable[..., nn.Module] | None = None,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        conv = BasicConv2d if conv_block is None else conv_block
        self.conv = conv(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(p=dropout)

    def _pool(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.adaptive_avg_pool2d(x, (4, 4))
        else:  # the compiler of TorchScript leaves this branch alone
            return _aux_pool(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self._pool(x)  # [N, in_channels, 4, 4]
        x = self.conv(x)  # [N, 128, 4, 4]
        x = torch.flatten(x, 1)  # [N, 2048]
        x = F.relu(self.fc1(x), inplace=True)  # [N, 1024]
        x = self.dropout(x)
        return self.fc2(x)


def _aux_pool(x: Tensor) -> Tensor:
    # Where algorithms must be deterministic, PyTorch's own pool refuses to run backward on CUDA.
    if torch.are_deterministic_algorithms_enabled() and not isinstance(x, torch.fx.Proxy):
        return reference.aux_pool(x)
    return F.adaptive_avg_pool2d(x, (4, 4))
