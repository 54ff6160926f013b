"""What the tests of the stem's two kernels share: the layers in plain PyTorch, and runs of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good_as_eager
from conv_cases import to_tf32
from kernel_devices import arranged, assert_margin_untouched, kernel_ops, kernels_on, torch_device
from torch import Tensor

from inception_ext.reference import pack_weight


@dataclass(frozen=True)
class Precision:
    """How the products are computed."""

    dtype: torch.dtype
    exact: bool = False

    @property
    def is_tf32(self) -> bool:
        return self.dtype == torch.float32 and not self.exact

    def factor(self, x: Tensor) -> Tensor:
        """What the multiplication takes of a value of the dtype."""
        return to_tf32(x) if self.is_tf32 else x

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}-exact" if self.exact else "tf32" if self.is_tf32 else name


PRECISIONS = [
    Precision(torch.float16),
    Precision(torch.bfloat16),
    Precision(torch.float32),
    Precision(torch.float32, exact=True),
]
HALF = PRECISIONS[0]

each_precision = pytest.mark.parametrize("precision", PRECISIONS, ids=str)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class ConvPool:
    """Parameters of stem_conv_pool, as the network has them."""

    op: ClassVar[str] = "stem_conv_pool"
    arrangement: ClassVar[str] = "nchw"  # of x, unless a test says otherwise

    weight: Tensor  # [64, 3, 7, 7], T
    bias: Tensor  # [64], float32
    scale: Sequence[float] = (0.458, 0.448, 0.45)
    shift: Sequence[float] = (-0.03, -0.088, -0.188)

    @classmethod
    def random(cls, dtype: torch.dtype, seed: int = 0) -> "ConvPool":
        weight = randn(64, 3, 7, 7, seed=seed) / 12
        return cls(weight.to(dtype), randn(64, seed=seed + 1) / 2)

    @staticmethod
    def output_shape(n: int, h: int, w: int) -> tuple[int, int, int, int]:
        """Of y, for images [n, 3, h, w]."""
        return n, 64, (h + 1) // 4, (w + 1) // 4

    def arguments(self, precision: Precision, device: str) -> tuple[object, ...]:
        """What stands between x and y."""
        weight, bias = (t.to(device) for t in (pack_weight(self.weight), self.bias))
        return weight, bias, list(self.scale), list(self.shift), precision.exact

    def layers(self, x: Tensor, precision: Precision, dtype: torch.dtype) -> Tensor:
        """One layer after the other, each rounded to the dtype."""
        images = x.to(torch.promote_types(dtype, torch.float32))
        scale, shift = (images.new_tensor(v).view(3, 1, 1) for v in (self.scale, self.shift))
        images = (images * scale + shift).to(dtype)
        weight = self.weight.to(dtype)
        if dtype == torch.float32:
            images, weight = precision.factor(images), precision.factor(weight)
        y = F.conv2d(images, weight, self.bias.to(dtype), 2, 3)
        return F.max_pool2d(F.relu(y), 3, 2, ceil_mode=True)


@dataclass(frozen=True)
class ConvConvPool:
    """Parameters of stem_conv_conv_pool."""

    op: ClassVar[str] = "stem_conv_conv_pool"
    arrangement: ClassVar[str] = "channels_last"

    weight1: Tensor  # [64, 64, 1, 1], T
    bias1: Tensor
    weight2: Tensor  # [192, 64, 3, 3], T
    bias2: Tensor

    @classmethod
    def random(cls, dtype: torch.dtype, seed: int = 0) -> "ConvConvPool":
        weight1, weight2 = randn(64, 64, 1, 1, seed=seed) / 8, randn(192, 64, 3, 3, seed=1) / 24
        bias1, bias2 = randn(64, seed=seed + 2) / 2, randn(192, seed=seed + 3) / 2
        return cls(weight1.to(dtype), bias1, weight2.to(dtype), bias2)

    @staticmethod
    def output_shape(n: int, h: int, w: int) -> tuple[int, int, int, int]:
        return n, 192, h // 2, w // 2

    def arguments(self, precision: Precision, device: str) -> tuple[object, ...]:
        tensors = (pack_weight(self.weight1), self.bias1, pack_weight(self.weight2), self.bias2)
        return *(t.to(device) for t in tensors), precision.exact

    def layers(self, x: Tensor, precision: Precision, dtype: torch.dtype) -> Tensor:
        x, weight1, weight2 = (t.to(dtype) for t in (x, self.weight1, self.weight2))
        if dtype == torch.float32:
            x, weight1, weight2 = (precision.factor(t) for t in (x, weight1, weight2))
        reduced = F.relu(F.conv2d(x, weight1, self.bias1.to(dtype)))
        if dtype == torch.float32:
            reduced = precision.factor(reduced)
        y = F.conv2d(reduced, weight2, self.bias2.to(dtype), padding=1)
        return F.max_pool2d(F.relu(y), 3, 2, ceil_mode=True)


def run(
    x: Tensor,
    parameters: ConvPool | ConvConvPool,
    precision: Precision,
    device: str,
    arrangement: str | None = None,
    out: str = "channels_last",
) -> Tensor:
    """What the kernel makes of x; the arrangements of x and of y are kernel_devices'."""
    where = torch_device(device)
    n, _, h, w = x.shape
    empty = torch.full(parameters.output_shape(n, h, w), torch.nan, dtype=precision.dtype)
    source = arranged(x, arrangement or parameters.arrangement, where)
    y = arranged(empty, out, where)
    op = getattr(kernel_ops(device), parameters.op)
    assert op(source, *parameters.arguments(precision, where), y) is None
    assert_margin_untouched(y)
    return y.cpu()


def counted(
    x: Tensor, parameters: ConvPool | ConvConvPool, precision: Precision, **settings: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The same on the emulator, and what it counted."""
    with kernels_on("emulator", **settings) as launches:
        y = run(x, parameters, precision, "emulator")
    (launch,) = launches
    return y, launch


def assert_right(
    y: Tensor, x: Tensor, parameters: ConvPool | ConvConvPool, precision: Precision
) -> None:
    eager = parameters.layers(x, precision, precision.dtype)
    assert_as_good_as_eager(y, eager, parameters.layers(x, precision, torch.float64))
