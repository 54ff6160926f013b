"""The global average pool and the local response normalisation of the CUDA kernels."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_as_good_as_eager
from kernel_devices import (
    ARRANGEMENTS,
    arranged,
    assert_margin_untouched,
    each_device,
    kernel_ops,
    kernels_on,
    needs_emulator,
    torch_device,
)
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WINDOW = (5, 1e-4, 0.75, 1.0)  # of the 2014 network: size, alpha, beta, k

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def global_avg_pool(
    x: Tensor, device: str, arrangement: str = "channels_last", out: str = "channels_last"
) -> Tensor:
    source = arranged(x, arrangement, torch_device(device))
    y = arranged(x.new_full((*x.shape[:2], 1, 1), torch.nan), out, torch_device(device))
    assert kernel_ops(device).global_avg_pool(source, y) is None
    assert_margin_untouched(y)
    return y.cpu()


def lrn(
    x: Tensor,
    device: str,
    window: tuple[int, float, float, float] = WINDOW,
    arrangement: str = "channels_last",
    out: str = "channels_last",
) -> Tensor:
    source = arranged(x, arrangement, torch_device(device))
    y = arranged(torch.full_like(x, torch.nan), out, torch_device(device))
    assert kernel_ops(device).lrn(source, *window, y) is None
    assert_margin_untouched(y)
    return y.cpu()


def eager_lrn(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """torch's local_response_norm, step by step in the dtype of x: torch has none for 16 bits."""
    squares = F.pad(x.square(), (0, 0, 0, 0, size // 2, (size - 1) // 2))
    mean = sum(squares[:, i : i + x.shape[1]] for i in range(size)) / size
    return x / (mean * alpha + k).pow(beta)


def assert_normalised(y: Tensor, x: Tensor, window: tuple[int, float, float, float]) -> None:
    reference = F.local_response_norm(x.double(), *window)
    assert_as_good_as_eager(y, eager_lrn(x, *window), reference)


def assert_averaged(y: Tensor, x: Tensor) -> None:
    assert_as_good_as_eager(y, F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x.double(), 1))


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(3, 1024, 7, 7), (1, 1024, 7, 7), (2, 520, 1, 1), (2, 9, 5, 3)])
def test_global_avg_pool(device, dtype, shape):
    x = random(*shape, dtype=dtype)
    with kernels_on(device, seed=1):
        y = global_avg_pool(x, device)
    assert_averaged(y, x)


@each_device
@each_dtype
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("out", ["channels_last", "sliced", "misaligned"])
def test_layouts(device, dtype, arrangement, out):
    """Slices and misaligned ones; what lies between the elements of y stays as it was."""
    x = random(2, 40, 3, 5, dtype=dtype)
    with kernels_on(device, seed=2):
        mean = global_avg_pool(x, device, arrangement, out)
        y = lrn(x, device, WINDOW, arrangement, out)
    assert_averaged(mean, x)
    assert_normalised(y, x, WINDOW)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(3, 64, 9, 5), (1, 192, 7, 8), (2, 8, 3, 2), (2, 17, 4, 3)])
@pytest.mark.parametrize(
    "window", [WINDOW, (5, 0.5, 0.75, 2.0), (5, 2.0, 1.3, 0.5), (3, 0.1, 0.5, 1.0)]
)
def test_lrn(device, dtype, shape, window):
    x = 3 * random(*shape, dtype=dtype)
    with kernels_on(device, seed=3):
        y = lrn(x, device, window)
    assert_normalised(y, x, window)


@each_device
@pytest.mark.parametrize("size", [1, 2, 4, 7, 40, 2**31 - 1])
def test_lrn_windows_of_other_sizes(device, size):
    x = random(2, 24, 3, 2, dtype=torch.float32)
    alpha = 0.5 * size
    with kernels_on(device, counting=False):
        y = lrn(x, device, (size, alpha, 0.75, 1.0))
    # As torch defines it, without padding by as many channels as the window has.
    first = torch.arange(24)[:, None] - size // 2  # of channel k's window
    channel = torch.arange(24)
    weight = ((channel >= first) & (channel < first + size)).double()
    squares = torch.einsum("kc,nchw->nkhw", weight, x.double().square())
    expected = x.double() / (1 + alpha / size * squares).pow(0.75)
    if size < 100:
        eager = F.local_response_norm(x.double(), size, alpha, 0.75, 1.0)
        torch.testing.assert_close(expected, eager, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.double(), expected, rtol=4e-7, atol=0)


@each_device
@each_dtype
def test_nan_and_infinity_as_in_torch(device, dtype):
    x = random(3, 24, 4, 3, dtype=dtype)
    x[0, 3, 1, 1] = torch.nan
    x[1, 8, 2, 0] = torch.inf
    x[1, 16, 3, 2] = -torch.inf
    wide = (7, 1.0, 0.75, 1.0)
    with kernels_on(device, counting=False):
        mean, y = global_avg_pool(x, device), lrn(x, device)
        assert_normalised(lrn(x, device, wide), x, wide)
    assert_averaged(mean, x)
    assert_normalised(y, x, WINDOW)
    assert mean[0].isnan().sum() == 1 and y[0].isnan().sum() == 5 and not mean[2].isnan().any()


@each_device
@pytest.mark.parametrize("shape", [(0, 16, 3, 3), (2, 0, 3, 3)])
def test_nothing_to_do(device, shape):
    x = torch.empty(shape)
    with kernels_on(device) as launches:
        assert global_avg_pool(x, device).shape == (*shape[:2], 1, 1)
        assert lrn(x, device).shape == shape
    assert launches == []


@needs_emulator
@each_dtype
def test_counters(dtype):
    """Each byte once, no bank conflict, one launch; and the same bits for every seed."""
    x, size = random(3, 192, 7, 7, dtype=dtype), dtype.itemsize
    results = []
    for seed in range(4):
        with kernels_on("emulator", seed=seed) as launches:
            results.append((global_avg_pool(x, "emulator"), lrn(x, "emulator")))
        pool, norm = launches
        assert pool["bytes_touched"] == pool["bytes_read"] + 3 * 192 * size
        assert pool["touched"] == [
            {"operand": "x", "read": x.numel() * size, "written": 0},
            {"operand": "y", "read": 0, "written": 3 * 192 * size},
        ]
        assert norm["bytes_touched"] == 2 * x.numel() * size
        assert norm["bytes_read"] <= 2 * x.numel() * size
        assert pool["bank_conflicts"] == norm["bank_conflicts"] == 0
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))


@needs_emulator
def test_bad_arguments():
    ops = kernel_ops("emulator")
    x, y, mean = torch.zeros(2, 8, 3, 3), torch.zeros(2, 8, 3, 3), torch.zeros(2, 8, 1, 1)
    nhwc = y.contiguous(memory_format=torch.channels_last)
    for call, message in [
        (lambda: ops.global_avg_pool(x[0], mean), "pool: x: expected 4D input, got 3D"),
        (lambda: ops.global_avg_pool(x.double(), mean), "pool: x: expected .*, got float64"),
        (lambda: ops.global_avg_pool(x, mean.half()), "pool: y: expected float32, got float16"),
        (lambda: ops.global_avg_pool(x, mean[:1]), r"pool: y: expected shape \[2, 8, 1, 1\], got"),
        (lambda: ops.global_avg_pool(x[:, :, :0], mean), "pool: x: expected at least one pixel"),
        (
            lambda: ops.global_avg_pool(x, mean.transpose(0, 1).contiguous().transpose(0, 1)),
            "pool: y: expected channels_last or a channel slice",
        ),
        (lambda: ops.lrn(x[0], *WINDOW, nhwc), "lrn: x: expected 4D input, got 3D"),
        (lambda: ops.lrn(x.int(), *WINDOW, nhwc), "lrn: x: expected .*, got int32"),
        (lambda: ops.lrn(x, *WINDOW, nhwc.half()), "lrn: y: expected float32, got float16"),
        (lambda: ops.lrn(x, *WINDOW, mean), r"lrn: y: expected shape \[2, 8, 3, 3\], got"),
        (lambda: ops.lrn(x, *WINDOW, y), "lrn: y: expected channels_last or a channel slice"),
        (lambda: ops.lrn(x, 0, 1.0, 1.0, 1.0, nhwc), "lrn: size: expected 1 to 2147483647, got 0"),
        (lambda: ops.lrn(x, 2**31, 1.0, 1.0, 1.0, nhwc), "lrn: size: expected 1 to 2147483647"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
