"""The auxiliary heads' average pool on the CUDA kernels, in training."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_all_as_good_as_eager
from fast_path import ALL_ARRANGEMENTS, randn
from kernel_devices import each_device, needs_emulator
from torch import Tensor
from weightless_cases import ADAPTIVE, PAPER, each_dtype, kernel_results, results

from inception_ext import functional, reference


def check_aux_pool(
    device: str, x: Tensor, grad: Tensor, window: tuple[int, int, int] = ADAPTIVE
) -> None:
    ours, launches = kernel_results(device, lambda x: functional.aux_pool(x, *window), x, grad)
    output_size, kernel_size, stride = window

    def exact(x: Tensor) -> Tensor:
        if kernel_size:
            return F.avg_pool2d(x, kernel_size, stride)
        return F.adaptive_avg_pool2d(x, output_size)

    assert_all_as_good_as_eager(
        ours,
        results(lambda x: reference.aux_pool(x, *window), x, grad),
        results(exact, x.double(), grad.double()),
    )
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    if device == "emulator":
        assert [launch["op"] for launch in launches] == ["aux_pool_forward", "aux_pool_backward"]


@each_device
@each_dtype
@pytest.mark.parametrize("channels", [7, 24])
@pytest.mark.parametrize(
    "size", [(14, 14), (13, 9), (1, 1), (4, 4), (15, 15), (2, 3), (5, 28)], ids=str
)
def test_aux_pool(device, size, channels, dtype):
    x = randn(3, channels, *size, dtype=dtype)
    check_aux_pool(device, x, randn(3, channels, 4, 4, seed=1, dtype=dtype))


@each_device
@pytest.mark.parametrize("output_size", [1, 2, 3, 7, 20])
def test_aux_pool_to_other_sizes(device, output_size):
    grad = randn(2, 8, output_size, output_size, seed=1)
    check_aux_pool(device, randn(2, 8, 13, 9), grad, (output_size, 0, 1))


@each_device
@each_dtype
@pytest.mark.parametrize("size", [(14, 14), (16, 15)], ids=str)
def test_aux_pool_of_the_paper(device, size, dtype):
    """The last rows and columns of larger maps are in no window."""
    x, grad = randn(2, 528, *size, dtype=dtype), randn(2, 528, 4, 4, seed=1, dtype=dtype)
    check_aux_pool(device, x, grad, PAPER)
    check_aux_pool(device, x, grad)


@each_device
@pytest.mark.parametrize(
    ("size", "window"),
    [((9, 7), (2, 3, 4)), ((9, 9), (3, 2, 3)), ((8, 9), (8, 1, 1)), ((6, 6), (1, 6, 5))],
    ids=str,
)
def test_aux_pool_with_gaps_and_overlaps(device, size, window):
    x, grad = randn(2, 8, *size), randn(2, 8, window[0], window[0], seed=1)
    ours, _ = kernel_results(device, lambda x: functional.aux_pool(x, *window), x, grad)
    eager, exact = (
        results(lambda x: reference.aux_pool(x, *window), *tensors)
        for tensors in ((x, grad), (x.double(), grad.double()))
    )
    assert_all_as_good_as_eager(ours, eager, exact)


@each_device
@each_dtype
@pytest.mark.parametrize("arrangement", ALL_ARRANGEMENTS)
def test_aux_pool_takes_any_strides(device, arrangement, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    x, grad = randn(3, 16, 7, 6, dtype=dtype), randn(3, 16, 4, 4, seed=1, dtype=dtype)
    check_aux_pool(device, arrange(x), grad)
    check_aux_pool(device, x, arrange(grad))


@each_device
@each_dtype
def test_aux_pool_passes_nan_and_infinity_on(device, dtype):
    x, grad = randn(3, 16, 7, 7, dtype=dtype), randn(3, 16, 4, 4, seed=1, dtype=dtype)
    x[0, 3, 1, 1], x[1, 8, 3, 3], x[2, 9, 0, 0], x[2, 9, 0, 1] = (
        *(torch.nan, torch.inf),
        *(torch.inf, -torch.inf),
    )
    grad[0, 5, 1, 2], grad[1, 6, 0, 0], grad[2, 7, 1, 1] = torch.nan, torch.inf, -torch.inf
    check_aux_pool(device, x, grad)


@needs_emulator
@each_dtype
@pytest.mark.parametrize("window", [ADAPTIVE, PAPER], ids=["adaptive", "paper"])
def test_what_aux_pool_touches(window, dtype):
    """x and y once, each gradient once, one launch each way, and the same bits for every seed."""
    x, grad = randn(2, 528, 14, 14, dtype=dtype), randn(2, 528, 4, 4, seed=1, dtype=dtype)
    large, small = x.numel() * dtype.itemsize, grad.numel() * dtype.itemsize
    runs = []
    for seed in range(3):
        ours, (forward, backward) = kernel_results(
            "emulator", lambda x: functional.aux_pool(x, *window), x, grad, seed
        )
        assert forward["touched"] == [
            {"operand": "x", "read": large, "written": 0},
            {"operand": "y", "read": 0, "written": small},
        ]
        assert backward["touched"] == [
            {"operand": "grad", "read": small, "written": 0},
            {"operand": "dx", "read": 0, "written": large},
        ]
        assert forward["bank_conflicts"] == backward["bank_conflicts"] == 0
        runs.append(ours)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)
