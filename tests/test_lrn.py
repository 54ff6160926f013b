"""Local response normalisation on the CUDA kernels, in training."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_all_as_good_as_eager
from fast_path import ALL_ARRANGEMENTS, randn
from kernel_devices import each_device, needs_emulator
from test_avg_pool_and_lrn import eager_lrn
from torch import Tensor
from weightless_cases import STRONG, WINDOW, each_dtype, kernel_results, results

from inception_ext import functional


def check_lrn(
    device: str, x: Tensor, grad: Tensor, window: tuple[int, float, float, float]
) -> None:
    ours, launches = kernel_results(device, lambda x: functional.lrn(x, *window), x, grad)
    eager = results(lambda x: eager_lrn(x, *window), x, grad)
    exact = results(lambda x: F.local_response_norm(x, *window), x.double(), grad.double())
    assert_all_as_good_as_eager(ours, eager, exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    if device == "emulator":
        assert [launch["op"] for launch in launches] == ["lrn", "lrn_backward"]


@each_device
@each_dtype
@pytest.mark.parametrize(
    "shape", [(3, 64, 9, 5), (1, 192, 7, 8), (2, 8, 3, 2), (2, 17, 4, 3), (2, 7, 1, 1)], ids=str
)
@pytest.mark.parametrize("window", [WINDOW, STRONG, (5, 1.0, 1.3, 0.5), (3, 0.1, 0.5, 1.0)])
def test_lrn(device, window, shape, dtype):
    x, grad = 3 * randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    check_lrn(device, x, grad, window)


@each_device
@each_dtype
@pytest.mark.parametrize("arrangement", ALL_ARRANGEMENTS)
def test_lrn_takes_any_strides(device, arrangement, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    x, grad = randn(3, 16, 7, 6, dtype=dtype), randn(3, 16, 7, 6, seed=1, dtype=dtype)
    check_lrn(device, arrange(x), grad, STRONG)
    check_lrn(device, x, arrange(grad), STRONG)


@each_device
@pytest.mark.parametrize("size", [1, 2, 4, 7, 24, 40, 2**31 - 1])
def test_lrn_windows_of_other_sizes(device, size):
    x, grad = randn(2, 24, 3, 2), randn(2, 24, 3, 2, seed=1)
    window = (size, 0.5 * size, 0.75, 1.0)
    ours, _ = kernel_results(device, lambda x: functional.lrn(x, *window), x, grad)

    def exact(x: Tensor) -> Tensor:
        """As torch defines it, without padding by as many channels as the window has."""
        channel = torch.arange(24)
        first = channel[:, None] - size // 2  # of channel k's window
        holds = ((channel >= first) & (channel < first + size)).to(x.dtype)
        return x / (1 + 0.5 * torch.einsum("kc,nchw->nkhw", holds, x.square())).pow(0.75)

    eager = results(exact, x, grad)
    assert_all_as_good_as_eager(ours, eager, results(exact, x.double(), grad.double()))


@each_device
@each_dtype
@pytest.mark.parametrize("window", [WINDOW, (7, 1.0, 0.75, 1.0)])
def test_lrn_passes_nan_and_infinity_on_as_torch_does(device, window, dtype):
    x, grad = randn(3, 32, 4, 3, dtype=dtype), randn(3, 32, 4, 3, seed=1, dtype=dtype)
    x[0, 3, 1, 1], x[1, 8, 2, 0], x[1, 16, 3, 2] = torch.nan, torch.inf, -torch.inf
    grad[2, 20, 0, 0], grad[2, 30, 3, 1] = torch.nan, torch.inf
    check_lrn(device, x, grad, window)


@each_device
def test_lrn_whose_window_divides_by_zero(device):
    """Without k, channels beyond the ends must stay out, and zeros are NaN as in torch."""
    window = (5, 1.0, 0.75, 0.0)
    x, grad = randn(2, 16, 3, 3), randn(2, 16, 3, 3, seed=1)
    check_lrn(device, x, grad, window)
    x[1] = 0
    ours, _ = kernel_results(device, lambda x: functional.lrn(x, *window), x, grad)
    assert ours["dx"][0].isfinite().all() and ours["dx"][1].isnan().all()


@needs_emulator
@each_dtype
def test_what_lrn_touches(dtype):
    """Each byte once, no bank conflict, one launch each way; and the same bits for every seed."""
    x, grad = randn(3, 192, 7, 7, dtype=dtype), randn(3, 192, 7, 7, seed=1, dtype=dtype)
    runs = []
    for seed in range(3):
        ours, (forward, backward) = kernel_results(
            "emulator", lambda x: functional.lrn(x, *WINDOW), x, grad, seed
        )
        size = x.numel() * dtype.itemsize
        assert forward["bytes_touched"] == 2 * size and backward["bytes_touched"] == 3 * size
        assert backward["touched"] == [
            {"operand": "grad", "read": size, "written": 0},
            {"operand": "x", "read": size, "written": 0},
            {"operand": "dx", "read": 0, "written": size},
        ]
        assert "lrn_backward_vector_kernel" in backward["kernel"]
        assert forward["bank_conflicts"] == backward["bank_conflicts"] == 0
        runs.append(ours)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)
