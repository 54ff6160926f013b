"""Networks in which rounding decides nothing: for checks of gradients.

A ReLU or a max pool that decides otherwise, because two values differ by less than their rounding
errors, moves gradients by per cents, in any implementation. A gradient that is wrong by a hundredth
hides behind that. So the shift of each channel is put where no value of the channel is near 0.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["settle"]

NEAR = 256  # values of a channel around 0 between which the widest gap is sought


def settle(network: nn.Module, x: Tensor) -> float:
    """Moves the shifts of all batch norms so that no ReLU behind them is a close decision for x.

    Args:
        network: float64, in training mode, each batch norm before a ReLU; changed in place. The new
            shifts are float32 numbers.
        x: float64 ``[N, C, H, W]``.

    Returns:
        The smallest distance between the two largest values in a window of an
        ``nn.MaxPool2d`` of the network, infinity where it has none.
    """
    distances = [float("inf")]
    hooks = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(_shift))
        elif isinstance(module, nn.MaxPool2d):
            hooks.append(module.register_forward_pre_hook(partial(_closest, distances)))
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return min(distances)


def _shift(norm: Any, args: Any, y: Tensor) -> Tensor:
    """Puts the widest gap between values near 0 around 0, and y with it."""
    values = y.transpose(0, 1).flatten(1)  # [C, N * H * W]
    near = values.abs().topk(min(NEAR, values.shape[1]), largest=False).indices
    near = values.gather(1, near).sort().values
    width, place = near.diff().max(1)
    middle = near.gather(1, place[:, None])[:, 0] + width / 2
    before = norm.bias.clone()
    norm.bias.copy_((before - middle).float())
    return y + (norm.bias - before)[:, None, None]


def _closest(distances: list[float], pool: Any, args: tuple[Tensor]) -> None:
    """Notes how close a decision of the pool is; between zeros, the outcome of ReLUs, none is."""
    (x,) = args
    size, stride, padding = pool.kernel_size, pool.stride, pool.padding
    p, q = F.max_pool2d(x, size, stride, padding, ceil_mode=pool.ceil_mode).shape[2:]
    more = padding + stride  # as many as ceil_mode may reach over
    x = F.pad(x, (padding, more, padding, more), value=-1.0)
    x = x[:, :, : (p - 1) * stride + size, : (q - 1) * stride + size]  # no window but the pool's
    windows = F.unfold(x, size, stride=stride).unflatten(1, (x.shape[1], size * size))
    first, second = windows.topk(2, dim=2).values.unbind(2)
    apart = (first - second)[first > 0]
    if apart.numel():
        distances.append(apart.min().item())
