"""The emulated kernels of batch norm + ReLU + max pool in one pass, forward and backward."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import training_kernels as kernels
from batch_norm_cases import (
    Norm,
    apply,
    backward,
    each_arrangement,
    each_dtype,
    eager,
    generator,
    keep_clear_of_zero,
    vectors,
)
from closeness import assert_as_good_as_eager
from emulator_build import COMPILER, HEADERS
from torch import Tensor
from training_kernels import DTYPE_CODE, INVALID_VALUE, Tensors, emulator, require_success

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]


class Case(NamedTuple):
    n: int
    h: int
    w: int
    kernel: int = 3
    stride: int = 2
    padding: int = 0

    def fields(self) -> dict[str, int]:
        sides = ("kernel", "stride", "padding")
        window = {f"{name}_{side}": getattr(self, name) for name in sides for side in "hw"}
        output = zip(("output_h", "output_w"), self.output(), strict=True)
        return window | {"input_h": self.h, "input_w": self.w} | dict(output)

    def output(self) -> tuple[int, int]:
        pooled = F.max_pool2d(torch.zeros(1, 1, self.h, self.w), *self[3:], ceil_mode=True)
        return pooled.shape[2], pooled.shape[3]

    def pool(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[N * H * W, C] -> maximum and its index in the window [N, OH, OW, C]."""
        images = y.float().reshape(self.n, self.h, self.w, -1).permute(0, 3, 1, 2)
        value, index = F.max_pool2d(images, *self[3:], ceil_mode=True, return_indices=True)
        oh, ow = (torch.arange(size) * self.stride - self.padding for size in self.output())
        kh, kw = index // self.w - oh[:, None], index % self.w - ow
        return nhwc(value), nhwc(kh * self.kernel + kw).to(torch.uint8)

    def scatter(self, dy: Tensor, argmax: Tensor) -> Tensor:
        """dy [N, OH, OW, C] float64 -> gradient of the pool's input [N * H * W, C]."""
        n, oh, ow, c = dy.shape
        row = torch.arange(oh)[:, None, None] * self.stride - self.padding
        column = torch.arange(ow)[:, None] * self.stride - self.padding
        h, w = row + argmax.long() // self.kernel, column + argmax.long() % self.kernel
        image = torch.arange(n)[:, None, None, None] * self.h * self.w
        dx = torch.zeros(n * self.h * self.w, c, dtype=torch.float64)
        return dx.scatter_add(0, (image + h * self.w + w).reshape(-1, c), dy.reshape(-1, c))


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


CASES = [Case(2, 9, 7), Case(1, 8, 8, 3, 2, 1), Case(2, 6, 5, 3, 1, 1), Case(2, 5, 8, 2, 2)]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def fused(norm: Norm, case: Case) -> tuple[Tensor, Tensor]:
    shape = (case.n, *case.output(), norm.channels)
    y = torch.full(shape, torch.nan, dtype=norm.x.dtype)
    argmax = torch.full(shape, 0xEE, dtype=torch.uint8)
    tensors, pixel = Tensors(), norm.x.stride(0)
    fields = tensors.fields("READ", x=norm.x) | tensors.fields("WRITE", y=y, argmax=argmax)
    fields |= vectors(tensors, norm) | case.fields()
    fields |= {
        "x_stride": [case.h * case.w * pixel, case.w * pixel, pixel],
        "y_stride": list(y.stride()[:3]),
        "batch": case.n,
        "channels": norm.channels,
        "dtype": DTYPE_CODE[norm.x.dtype],
    }
    require_success(kernels.load_module().max_pool(fields, tensors.declared))
    return y, argmax


def make(case: Case, dtype: torch.dtype, arrangement: str, seed: int, ties: bool) -> Norm:
    channels = 21 if arrangement == "misaligned" else 40
    norm = Norm(case.n * case.h * case.w, channels, dtype, seed, arrangement)
    if ties:
        norm.x.copy_(norm.x.float().round())
    keep_clear_of_zero(norm)
    return norm


@each_dtype
@each_arrangement
@each_case
@pytest.mark.parametrize("ties", [False, True])
def test_forward_is_that_of_the_two_ops(dtype, arrangement, case, ties):
    """Bit for bit: the values, and which of equal ones wins."""
    norm = make(case, dtype, arrangement, 1, ties)
    norm.x[5, 3] = torch.nan
    with emulator(seed=1) as launches:
        y, argmax = fused(norm, case)
        (whole,) = apply([norm])
    value, index = case.pool(whole)
    assert torch.equal(y.float().nan_to_num(-7), value.nan_to_num(-7))
    assert torch.equal(argmax, index)
    launch = launches[0]
    assert launch["bank_conflicts"] == 0
    touched = {t["operand"]: t["read"] + t["written"] for t in launch["touched"]}
    assert touched["x"] <= norm.x.numel() * dtype.itemsize
    assert touched["y"] == y.numel() * dtype.itemsize and touched["argmax"] == argmax.numel()


@each_dtype
@each_arrangement
@each_case
@pytest.mark.parametrize("training", [True, False])
def test_backward(dtype, arrangement, case, training):
    """dy comes from the pool's output and argmax, with many ties among zeros."""
    norm = make(case, dtype, arrangement, 2, ties=True)
    with emulator(seed=2) as launches:
        y, norm.argmax = fused(norm, case)
        norm.dy = torch.randn(y.shape, generator=generator(3)).to(dtype).flatten(0, 2)
        pooled_dy = norm.dy.reshape(y.shape)
        (result,) = backward([norm], training, pool=case.fields())
    norm.dy = case.scatter(pooled_dy.double(), norm.argmax)
    expected = eager(norm, training), eager(norm, training, torch.float64)
    for name, tensor in result.items():
        assert_as_good_as_eager(tensor, expected[0][name], expected[1][name], name=name)
    _, reduce, last = launches
    assert reduce["bank_conflicts"] == last["bank_conflicts"] == 0
    for launch in (reduce, last):  # nothing of the size of x but x and dx
        touched = {t["operand"]: t["read"] + t["written"] for t in launch["touched"]}
        assert touched["x"] == norm.x.numel() * dtype.itemsize
        assert touched["dy"] <= y.numel() * dtype.itemsize
        assert touched["argmax"] <= y.numel()


def test_same_bits_for_every_seed():
    case = CASES[0]
    norm = make(case, torch.float16, "dense", 4, ties=True)
    runs = []
    for seed in range(3):
        with emulator(seed):
            y, norm.argmax = fused(norm, case)
            norm.dy = y.flatten(0, 2).clone()
            (result,) = backward([norm], pool=case.fields())
        runs.append([y, norm.argmax, *result.values()])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_bad_params():
    case = CASES[0]
    norm = make(case, torch.float16, "dense", 5, ties=False)
    tensors = Tensors()
    fields = vectors(tensors, norm) | case.fields()
    fields |= {"x_stride": [1, 1, 1], "y_stride": [1, 1, 1], "batch": 2, "channels": 8, "dtype": 0}
    assert kernels.load_module().max_pool(fields, []) == INVALID_VALUE  # no x
    assert kernels.load_module().max_pool(fields | {"kernel_h": 5}, []) == INVALID_VALUE
