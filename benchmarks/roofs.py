"""What this device does in a second at best, measured: a large matrix product, and a large copy."""

import statistics
from collections.abc import Callable

import torch
from devices import Device
from floors import Roof

__all__ = ["measure"]


def measure(device: Device, dtype: torch.dtype) -> Roof:
    """The rates that floors are counted with, on random data.

    Args:
        device: the one to measure, some 0.1 s.
        dtype: of the product.
    """
    on_gpu = device.type == "cuda"
    side, megabytes = (8192, 1024) if on_gpu else (512, 32)
    factors = [torch.randn(side, side, device=device.type).to(dtype) for _ in range(2)]
    product = torch.empty_like(factors[0])
    flops = 2 * side**3 / _least(device, lambda: torch.mm(*factors, out=product))
    source = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=device.type)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / _least(device, lambda: target.copy_(source))
    return Roof("as measured here", flops, rate)


def _least(device: Device, call: Callable[[], object]) -> float:
    """The median of some calls; not the shortest, which a clock that boosts may give once."""
    call()
    return statistics.median(device.seconds(call) for _ in range(10))
