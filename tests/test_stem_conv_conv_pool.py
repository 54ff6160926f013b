"""conv2 + conv3 + max pool in one kernel."""

import pytest
import torch
from kernel_devices import (
    ARRANGEMENTS,
    each_device,
    kernel_ops,
    kernels_on,
    needs_emulator,
)
from stem_cases import (
    HALF,
    PRECISIONS,
    ConvConvPool,
    Precision,
    assert_right,
    counted,
    each_precision,
    randn,
    run,
)
from torch import Tensor

# N, H, W: what images of 15 x 15, 33 x 47 and 64 x 64 give
SIZES = [(1, 4, 4), (3, 8, 12), (1, 16, 16)]


def activations(n: int, h: int, w: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    """As the first pool leaves them: not negative, many zero."""
    return randn(n, 64, h, w, seed=seed).relu().to(dtype)


@each_device
@each_precision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(device, precision, size):
    x, parameters = activations(*size, precision.dtype), ConvConvPool.random(precision.dtype)
    with kernels_on(device, seed=1):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)


@each_device
@pytest.mark.parametrize("size", [(2, 2, 2), (1, 3, 3), (1, 2, 67), (1, 29, 5)], ids=str)
def test_sizes_at_the_edge(device, size):
    """One pooled pixel; windows that end inside and outside; more tiles in one direction."""
    x, parameters = activations(*size, torch.float16), ConvConvPool.random(torch.float16, seed=2)
    with kernels_on(device, seed=2):
        y = run(x, parameters, HALF, device)
    assert_right(y, x, parameters, HALF)


@each_device
@each_precision
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_layouts(device, precision, arrangement):
    x, parameters = activations(2, 5, 9, precision.dtype), ConvConvPool.random(precision.dtype)
    out = "channels_last" if arrangement == "nchw" else arrangement
    with kernels_on(device, seed=3):
        y = run(x, parameters, precision, device, arrangement, out)
    assert_right(y, x, parameters, precision)


@each_device
@each_precision
def test_border_is_zero_after_the_first_convolution(device, precision):
    """Outside the image the 3x3 convolution reads 0, not relu(bias)."""
    x, parameters = activations(1, 6, 6, precision.dtype), ConvConvPool.random(precision.dtype)
    parameters.bias1.fill_(3.0)
    with kernels_on(device, counting=False):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)


@each_device
@each_precision
def test_nan_and_infinity_as_in_torch(device, precision):
    """A NaN reaches the 3x3 windows around it and no others, in its image alone."""
    x, parameters = activations(2, 4, 34, precision.dtype), ConvConvPool.random(precision.dtype)
    x[0, 7, 0, 0] = x[0, 63, 2, 31] = x[0, 0, 3, 33] = torch.nan
    x[0, 5, 1, 12] = torch.inf
    with kernels_on(device, seed=4):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)
    assert y[0].isnan().any() and not y[0].isnan().any(0).all() and not y[1].isnan().any()


@each_device
def test_no_images(device):
    x, parameters = activations(0, 8, 8, torch.float16), ConvConvPool.random(torch.float16)
    with kernels_on(device) as launches:
        assert run(x, parameters, HALF, device).shape == (0, 192, 4, 4)
    assert launches == []


@needs_emulator
@each_precision
def test_counters(precision):
    """Every byte once, no bank conflict, and the same bits for every seed."""
    x, parameters = activations(1, 5, 31, precision.dtype), ConvConvPool.random(precision.dtype)
    results = [counted(x, parameters, precision, seed=seed) for seed in range(4)]
    size = precision.dtype.itemsize
    for y, launch in results:
        assert torch.equal(y, results[0][0])
        assert launch["bank_conflicts"] == 0, launch["conflict_places"]
        assert launch["touched"] == [
            {"operand": "x", "read": x.numel() * size, "written": 0},
            {"operand": "weight1", "read": 64 * 64 * size, "written": 0},
            {"operand": "bias1", "read": 4 * 64, "written": 0},
            {"operand": "weight2", "read": 192 * 576 * size, "written": 0},
            {"operand": "bias2", "read": 4 * 192, "written": 0},
            {"operand": "y", "read": 0, "written": y.numel() * size},
        ]
        assert launch["useful_macs"] == 5 * 31 * (64 * 64 + 192 * 576)


@needs_emulator
@pytest.mark.parametrize("precision", [HALF, PRECISIONS[2]], ids=str)
def test_tiles_and_passes(precision):
    """The larger tiles of a large batch, and all three passes in one block; the same bits."""
    x, parameters = activations(1, 9, 30, precision.dtype), ConvConvPool.random(precision.dtype)
    y, launch = counted(x, parameters, precision, multiprocessors=132)
    assert launch["grid"] == (2 * 2, 3, 1)
    assert_right(y, x, parameters, precision)
    large, launch = counted(x, parameters, precision, multiprocessors=2, seed=6)
    down = 1 if precision.dtype == torch.float16 else 2  # tiles
    assert launch["grid"] == (down * 2, 1, 1) and launch["bank_conflicts"] == 0
    assert torch.equal(large, y)


@needs_emulator
def test_a_whole_image():
    """56 x 56, what an image of 224 x 224 gives: 28 columns are two tiles, without a remainder."""
    x, parameters = activations(1, 56, 56, torch.float16), ConvConvPool.random(torch.float16)
    y, launch = counted(x, parameters, HALF, multiprocessors=14)
    assert_right(y, x, parameters, HALF)
    weights = 2 * 64 * (64 + 3 * 576) + 4 * (64 + 192)
    assert launch["bytes_touched"] == 2 * (x.numel() + y.numel()) + weights
    # 9 rows of 32 columns for 8 of 28, and r on 11 rows of 32
    useful, issued = 8 * 28 * (64 + 9 * 192), 11 * 32 * 64 + 9 * 32 * 9 * 192
    assert launch["useful_macs"] / launch["issued_macs"] == pytest.approx(useful / issued)


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_compute_capability_7_5(dtype):
    parameters, precision = ConvConvPool.random(dtype), Precision(dtype)
    x = activations(1, 7, 20, dtype)
    y, _ = counted(x, parameters, precision, capability=75, shared_limit=64 << 10)
    assert_right(y, x, parameters, precision)


@needs_emulator
def test_too_little_shared_memory():
    x, parameters = activations(1, 6, 6, torch.float32), ConvConvPool.random(torch.float32)
    for precision in PRECISIONS[2:]:
        counted(x, parameters, precision, shared_limit=99 << 10)  # compute capability 8.6
        with pytest.raises(RuntimeError, match="stem_conv_conv_pool: launch"):
            counted(x, parameters, precision, shared_limit=64 << 10)


@needs_emulator
def test_bad_arguments():
    ops = kernel_ops("emulator")
    parameters = ConvConvPool.random(torch.float16)
    weight1, bias1, weight2, bias2, exact = parameters.arguments(HALF, "cpu")
    x = activations(2, 8, 8, torch.float16)
    y = torch.zeros(2, 4, 4, 192, dtype=torch.float16).permute(0, 3, 1, 2)
    good = [x, weight1, bias1, weight2, bias2, exact, y]
    ops.stem_conv_conv_pool(*good)
    storage = torch.zeros(64 * 64 + 4, dtype=torch.float16)
    for i, bad, message in [
        (0, x[0], "x: expected 4D input, got 3D"),
        (0, x.double(), "x: expected float16 or bfloat16 or float32, got float64"),
        (0, x[:, :63], r"x: expected shape \[2, 64, 8, 8\], got \[2, 63, 8, 8\]"),
        (0, x[:, :, :1], "x: Output size is too small: the pool's height is 1"),
        (0, x[..., :0], "x: expected 1 to 268435456 pixels a side, got shape"),
        (1, weight1.float(), "weight1: expected float16, got float32"),
        (1, weight1[:63], r"weight1: expected shape \[64, 64\], got \[63, 64\]"),
        (1, storage[4:].view(64, 64), "weight1: expected a contiguous tensor at a multiple of 16"),
        (2, bias1.half(), "bias1: expected float32, got float16"),
        (3, weight2[:, 8:], r"weight2: expected shape \[192, 576\], got \[192, 568\]"),
        (3, weight2.t().contiguous().t(), "weight2: expected a contiguous tensor"),
        (4, bias1, r"bias2: expected shape \[192\], got \[64\]"),
        (6, y.float(), "y: expected float16, got float32"),
        (6, y[:, :64], r"y: expected shape \[2, 192, 4, 4\], got \[2, 64, 4, 4\]"),
        (6, y.contiguous(), "y: expected channels_last or a channel slice of it"),
    ]:
        arguments = list(good)
        arguments[i] = bad
        with pytest.raises(RuntimeError, match=f"stem_conv_conv_pool: {message}"):
            ops.stem_conv_conv_pool(*arguments)


@needs_emulator
def test_opcheck():
    x, parameters = activations(1, 4, 4, torch.float16), ConvConvPool.random(torch.float16)
    y = torch.zeros(1, 2, 2, 192, dtype=torch.float16).permute(0, 3, 1, 2)
    x = x.contiguous(memory_format=torch.channels_last)
    op = kernel_ops("emulator").stem_conv_conv_pool.default
    torch.library.opcheck(op, (x, *parameters.arguments(HALF, "cpu"), y))
