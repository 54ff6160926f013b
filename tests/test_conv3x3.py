"""The 3x3 convolution of its own on the CPU, which goes by Winograd where that is faster."""

from typing import Any

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager, assert_as_good_as_eager
from fast_path import CalledOps, randn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from inception_ext import functional, reference
from inception_ext.modules import BasicConv2d

CHANNELS_LAST = {"memory_format": torch.channels_last}

# N, H, W; the first three are large enough for Winograd (csrc/torch/winograd.cpp: winograd_pays).
FAST, SLOW = [(8, 28, 28), (16, 13, 17), (3, 56, 31)], [(2, 7, 7), (1, 1, 1), (3, 2, 9)]


def results(library: Any, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = library.conv3x3(x, weight)
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad}


def inputs(size: tuple[int, int, int], c: int = 32, k: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    n, h, w = size
    x, grad = randn(n, c, h, w), randn(n, k, h, w, seed=1)
    return x.to(**CHANNELS_LAST), randn(k, c, 3, 3, seed=2) / 20, grad.to(**CHANNELS_LAST)


def judge(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    ours = results(functional, x, weight, grad)
    assert ours["y"].is_contiguous(**CHANNELS_LAST)
    eager = results(reference, x, weight, grad)
    exact = results(reference, x.double(), weight.double(), grad.double())
    assert_all_as_good_as_eager(ours, eager, exact, noise_floor=BLOCK_NOISE_FLOOR)
    return ours


@pytest.mark.parametrize("size", FAST + SLOW, ids=str)
@pytest.mark.parametrize(("c", "k"), [(32, 48), (64, 192), (37, 33)])
def test_values(size, c, k):
    judge(*inputs(size, c, k))


@pytest.mark.parametrize(("size", "is_fast"), [(FAST[0], True), (SLOW[0], False)])
def test_winograd_takes_a_quarter_of_the_multiplications(size, is_fast):
    """Its products are batched matrix products; oneDNN's convolution is not called for them."""
    x, weight, grad = inputs(size)
    with torch.profiler.profile() as profile:
        results(functional, x, weight, grad)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert ("aten::bmm" in calls) == is_fast and ("aten::convolution" in calls) != is_fast
    assert "aten::convolution_backward" in calls  # the weight's gradient


@pytest.mark.parametrize("size", [FAST[0], SLOW[0]], ids=str)
def test_any_strides(size):
    x, weight, grad = inputs(size)
    n, _, h, w = x.shape
    judge(x, weight, grad)
    wide = torch.zeros(n, 64, h, w).to(**CHANNELS_LAST)
    wide[:, 16:48] = x
    for other_x in (x.contiguous(), wide[:, 16:48], x.transpose(2, 3).contiguous().transpose(2, 3)):
        judge(other_x, weight.to(**CHANNELS_LAST), grad.contiguous())
    judge(x, weight, grad[:1, :, :1, :1].expand(grad.shape))


def test_no_images():
    x, weight, grad = inputs((0, 28, 28))
    found = results(functional, x, weight, grad)
    assert found["y"].shape == (0, 48, 28, 28) and found["dx"].shape == x.shape
    assert not found["dw"].any()


def test_a_nan_stays_in_its_image():
    x, weight, _ = inputs(FAST[0])
    clean = functional.conv3x3(x, weight)
    x[3, 7, 5, 5] = torch.nan
    y = functional.conv3x3(x, weight)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(y[others], clean[others]) and y[3, :, 4:7, 4:7].isnan().all()


def test_threads_and_runs_change_no_bit():
    x, weight, grad = inputs(FAST[0])
    first, threads = results(functional, x, weight, grad), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = results(functional, x, weight, grad)
            assert all(torch.equal(again[name], first[name]) for name in ("y", "dx"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("needs", ["x", "weight"])
def test_only_what_is_asked_for(needs):
    x, weight, grad = inputs(FAST[0])
    x.requires_grad_(needs == "x")
    weight.requires_grad_(needs == "weight")
    with FlopCounterMode(display=False) as ours:
        functional.conv3x3(x, weight).backward(grad)
    assert (x.grad is None) == (needs != "x") and (weight.grad is None) == (needs != "weight")
    with FlopCounterMode(display=False) as theirs:
        reference.conv3x3(x, weight).backward(grad)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


def test_second_order():
    x, weight, _ = inputs((4, 16, 16))

    def penalty(library: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = library.conv3x3(leaf, weight.to(dtype))
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaf)[0]

    exact = penalty(reference, torch.float64)
    assert_as_good_as_eager(penalty(functional), penalty(reference), exact, BLOCK_NOISE_FLOOR)


# The gate

BATCH_NORM = ["batch_norm_relu_forward", "batch_norm_relu_backward"]
FUSED = ["conv3x3_forward", *BATCH_NORM, "conv3x3_backward"]
X = inputs((2, 14, 14))[0]


def called(block: nn.Module, x: Tensor = X) -> list[str]:
    with CalledOps() as ops:
        block(x.requires_grad_()).sum().backward()
    return ops.names


def block(c: int = 32, k: int = 48, **kwargs: Any) -> BasicConv2d:
    return BasicConv2d(c, k, **{"kernel_size": 3, "padding": 1, **kwargs})


def test_a_block_calls_it():
    assert called(block()) == FUSED


@pytest.mark.parametrize(
    "change",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"k": 16},
     {"kernel_size": 1, "padding": 0}, {"kernel_size": 5, "padding": 2}],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_torchs(change):
    assert called(block(**change)) == BATCH_NORM


def test_hooks_and_subclasses_are_called():
    hooked, seen = block(), []
    hooked.conv.register_forward_hook(lambda *_: seen.append(True))
    assert called(hooked) == BATCH_NORM and seen == [True]

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    replaced = block()
    replaced.conv = Doubled(32, 48, 3, padding=1, bias=False)
    assert called(replaced) == BATCH_NORM


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    assert "conv3x3_forward" not in called(block().to(dtype), X.detach().to(dtype))


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert called(block(), X.detach()) == BATCH_NORM


def test_wrong_channels_are_torchs_error():
    with pytest.raises(RuntimeError, match="expected input"):
        functional.conv3x3(X, torch.randn(48, 33, 3, 3))


def test_compiled():
    x, weight, grad = inputs(FAST[0])

    class Library:
        conv3x3 = staticmethod(
            torch.compile(functional.conv3x3, fullgraph=True, backend="aot_eager")
        )

    found, expected = results(Library, x, weight, grad), results(functional, x, weight, grad)
    assert all(torch.equal(found[name], values) for name, values in expected.items())
