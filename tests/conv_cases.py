"""What the tests of conv_group and of conv_wgrad share: geometry, products, the workspace."""

from dataclasses import dataclass

import torch
from kernel_devices import kernel_ops, torch_device
from torch import Tensor

# How products are made: the dtype, and `exact`.
MATH = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "tf32": (torch.float32, False),
    "float32": (torch.float32, True),
}


@dataclass(frozen=True)
class Geometry:
    """Of one convolution: x [n, c, h, w], k filters that lie in one or more segments."""

    c: int = 8
    k: int = 8
    h: int = 6
    w: int = 5
    n: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    segments: tuple[int, ...] = ()  # filters of each; (): k

    @property
    def widths(self) -> tuple[int, ...]:
        return self.segments or (self.k,)

    @property
    def output_size(self) -> tuple[int, int]:
        sizes = zip((self.h, self.w), self.kernel, self.stride, self.padding, strict=True)
        p, q = ((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)
        return p, q

    @property
    def macs(self) -> int:
        p, q = self.output_size
        return self.n * p * q * self.k * self.c * self.kernel[0] * self.kernel[1]


def workspace_of(device: str) -> Tensor:
    size = kernel_ops(device).conv_group_workspace_bytes()
    return torch.zeros(size, dtype=torch.uint8, device=torch_device(device))


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa, ties away from zero, as cvt.rna does; NaN stays."""
    bits = (x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def assert_within_tf32(result: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """The bound on sums of products whose factors are rounded to TF32.

    Rounding changes a factor by at most 2^-11 of it, a product by 2^-10 + 2^-22, and each addition
    changes the sum by at most 2^-22 of the products' magnitude: tensor cores may cut off bits.
    """
    bound = (2.0**-10 + 2.0**-22 * (terms + 1)) * magnitude
    assert bool(((result.double() - exact).abs() <= bound).all())
