"""conv1 + ReLU + max pool in one kernel, from images of any dtype and layout."""

import pytest
import torch
from kernel_devices import (
    ARRANGEMENTS,
    each_device,
    kernel_ops,
    kernels_on,
    needs_emulator,
    torch_device,
)
from stem_cases import (
    HALF,
    PRECISIONS,
    ConvPool,
    Precision,
    assert_right,
    counted,
    each_precision,
    randn,
    run,
)
from torch import Tensor

SIZES = [(1, 15, 15), (3, 33, 47), (1, 64, 64)]  # N, H, W
IMAGE_DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def images(n: int, h: int, w: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    x = randn(n, 3, h, w, seed=seed)
    return (x * 60 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)


@each_device
@each_precision
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(device, precision, size):
    x, parameters = images(*size), ConvPool.random(precision.dtype)
    with kernels_on(device, seed=1):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)


@each_device
@pytest.mark.parametrize("size", [(2, 3, 3), (2, 4, 4), (1, 5, 130), (1, 60, 7)], ids=str)
def test_sizes_at_the_edge(device, size):
    """One pooled pixel; windows that end inside and outside; more tiles in one direction."""
    x, parameters = images(*size), ConvPool.random(torch.float16, seed=2)
    with kernels_on(device, seed=2):
        y = run(x, parameters, HALF, device)
    assert_right(y, x, parameters, HALF)


@each_device
@pytest.mark.parametrize("dtype", IMAGE_DTYPES, ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_images(device, dtype, arrangement):
    """What users pass: uint8 or floating, NCHW or NHWC, slices of wider tensors."""
    x = images(2, 21, 34, dtype)
    parameters = ConvPool.random(torch.float16, seed=3)
    if dtype == torch.uint8:  # torchvision's normalisation
        parameters = ConvPool(
            parameters.weight, parameters.bias, (0.01712, 0.01751, 0.01743), (-2.1, -2.0, -1.8)
        )
    with kernels_on(device, seed=3):
        y = run(x, parameters, HALF, device, arrangement)
    assert_right(y, x, parameters, HALF)


@each_device
def test_images_of_any_strides(device):
    """A crop, every second column, and one image for the whole batch."""
    x = images(2, 40, 80, seed=6)
    parameters = ConvPool.random(torch.float16)
    views = [
        lambda t: t[:, :, 3:30, 5:51],
        lambda t: t[:, :, :, ::2],
        lambda t: t.transpose(2, 3),
        lambda t: t[:1].expand(3, -1, -1, -1),
        lambda t: t[:, :1].expand(-1, 3, -1, -1),
    ]
    where = torch_device(device)
    for view in views:
        source = view(x.to(where))
        n, _, h, w = source.shape
        y = torch.full((n, (h + 1) // 4, (w + 1) // 4, 64), torch.nan, dtype=torch.float16)
        y = y.to(where).permute(0, 3, 1, 2)
        with kernels_on(device, counting=False):
            kernel_ops(device).stem_conv_pool(source, *parameters.arguments(HALF, where), y)
        assert_right(y.cpu(), view(x), parameters, HALF)


@each_device
@each_precision
@pytest.mark.parametrize("out", ["sliced", "misaligned"])
def test_outputs(device, precision, out):
    x, parameters = images(2, 19, 30), ConvPool.random(precision.dtype)
    with kernels_on(device, counting=False):
        y = run(x, parameters, precision, device, out=out)
    assert_right(y, x, parameters, precision)


@each_device
@each_precision
def test_border_is_zero_after_the_affine(device, precision):
    """Where the image is dark, 0 * scale + shift is not what lies outside."""
    x = torch.zeros(1, 3, 23, 23)
    weight, bias = ConvPool.random(precision.dtype).weight, torch.zeros(64)
    parameters = ConvPool(weight, bias, (1.0, 1.0, 1.0), (4.0, -3.0, 2.0))
    with kernels_on(device, counting=False):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)
    assert not torch.equal(y[..., 0, 0], y[..., 2, 2])


@each_device
@each_precision
def test_nan_and_infinity_as_in_torch(device, precision):
    """A NaN reaches the windows that hold it and no others, an infinity turns to NaN where the
    weights have both signs."""
    x, parameters = images(3, 45, 61), ConvPool.random(precision.dtype)
    for n, c, h, w in [(0, 0, 0, 0), (0, 2, 20, 33), (0, 1, 44, 60), (0, 0, 12, 59)]:
        x[n, c, h, w] = torch.nan
    x[1, 1, 30, 30] = torch.inf
    with kernels_on(device, seed=4):
        y = run(x, parameters, precision, device)
    assert_right(y, x, parameters, precision)
    assert y[0].isnan().all(0).sum() == 12 and not y[2].isnan().any()


@each_device
def test_weights_that_are_nan_or_zero(device):
    x, parameters = images(1, 20, 20), ConvPool.random(torch.float16)
    parameters.weight[5, 1, 6, 6] = torch.nan
    parameters.weight[6] = 0
    parameters.bias[6] = torch.nan
    with kernels_on(device, counting=False):
        y = run(x, parameters, HALF, device)
    assert_right(y, x, parameters, HALF)
    assert y[:, 5:7].isnan().all()


@each_device
def test_no_images(device):
    x, parameters = images(0, 32, 32), ConvPool.random(torch.float16)
    with kernels_on(device) as launches:
        assert run(x, parameters, HALF, device).shape == (0, 64, 8, 8)
    assert launches == []


@needs_emulator
@each_precision
def test_counters(precision):
    """Every byte once, no bank conflict, and the same bits for every seed."""
    x, parameters = images(1, 40, 90), ConvPool.random(precision.dtype)
    results = [counted(x, parameters, precision, seed=seed) for seed in range(4)]
    size = precision.dtype.itemsize
    for y, launch in results:
        assert torch.equal(y, results[0][0])
        assert launch["bank_conflicts"] == 0, launch["conflict_places"]
        assert launch["touched"] == [
            {"operand": "x", "read": 4 * x.numel(), "written": 0},
            {"operand": "weight", "read": 64 * 147 * size, "written": 0},
            {"operand": "bias", "read": 4 * 64, "written": 0},
            {"operand": "y", "read": 0, "written": y.numel() * size},
        ]
        assert launch["useful_macs"] == 20 * 45 * 64 * 147


@needs_emulator
def test_blocks_that_stay_for_more_tiles():
    """Four rows a tile, where they fill the device; two multiprocessors take them in turns."""
    x, parameters = images(3, 64, 64), ConvPool.random(torch.float16)
    y, launch = counted(x, parameters, HALF, multiprocessors=2, seed=7)
    assert launch["grid"] == (4, 1, 1) and launch["bank_conflicts"] == 0
    assert_right(y, x, parameters, HALF)
    small, launch = counted(x, parameters, HALF, multiprocessors=100)
    assert launch["grid"] == (3 * 8 * 2, 1, 1) and torch.equal(small, y)


@needs_emulator
def test_a_whole_image():
    """224 x 224 from uint8: 56 columns are four tiles, without a remainder."""
    x, parameters = images(1, 224, 224, torch.uint8), ConvPool.random(torch.float16)
    parameters = ConvPool(parameters.weight, parameters.bias, [1 / 64] * 3, [-2.0] * 3)
    y, launch = counted(x, parameters, HALF, multiprocessors=32)
    assert_right(y, x, parameters, HALF)
    assert launch["bytes_touched"] == x.numel() + 2 * y.numel() + 2 * 64 * 147 + 4 * 64
    # 9 rows of 32 columns for 8 of 28, K = 160 for 147
    assert launch["useful_macs"] / launch["issued_macs"] == pytest.approx(
        8 * 28 * 147 / (9 * 32 * 160)
    )


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_compute_capability_7_5(dtype):
    x, parameters, precision = images(1, 24, 60), ConvPool.random(dtype), Precision(dtype)
    y, _ = counted(x, parameters, precision, capability=75, shared_limit=64 << 10)
    assert_right(y, x, parameters, precision)


@needs_emulator
def test_too_little_shared_memory():
    ops = kernel_ops("emulator")
    x, parameters = images(1, 24, 24), ConvPool.random(torch.float32)
    with kernels_on("emulator", shared_limit=64 << 10):
        assert ops.stem_fits(torch.zeros(1, dtype=torch.float16))
        assert ops.stem_fits(torch.zeros(1, dtype=torch.bfloat16))
        assert not ops.stem_fits(torch.zeros(1))
        with pytest.raises(RuntimeError, match="stem_conv_pool: launch"):
            run(x, parameters, PRECISIONS[2], "emulator")
    with kernels_on("emulator", shared_limit=99 << 10):  # compute capability 8.6
        assert ops.stem_fits(torch.zeros(1))
        run(x, parameters, PRECISIONS[2], "emulator")


@needs_emulator
def test_bad_arguments():
    ops = kernel_ops("emulator")
    parameters = ConvPool.random(torch.float16)
    weight, bias, scale, shift, exact = parameters.arguments(HALF, "cpu")
    x = images(2, 32, 32)
    y = torch.zeros(2, 8, 8, 64, dtype=torch.float16).permute(0, 3, 1, 2)
    good = [x, weight, bias, scale, shift, exact, y]
    ops.stem_conv_pool(*good)
    for i, bad, message in [
        (0, x[0], "x: expected 4D input, got 3D"),
        (0, x.double(), "x: expected uint8 or float16 or bfloat16 or float32, got float64"),
        (0, x[:, :2], r"x: expected shape \[2, 3, 32, 32\], got \[2, 2, 32, 32\]"),
        (0, x[:, :, :0], "x: expected 1 to 268435456 pixels a side, got shape"),
        (0, x[:, :, :2], "x: Output size is too small: the pool's height is 1"),
        (0, x[..., :1], "x: Output size is too small: the pool's width is 1"),
        (1, weight.double(), "weight: expected .*, got float64"),
        (1, weight[:, :147], r"weight: expected shape \[64, 152\], got \[64, 147\]"),
        (1, weight.t().contiguous().t(), "weight: expected a contiguous tensor"),
        (2, bias.half(), "bias: expected float32, got float16"),
        (2, bias[:63], r"bias: expected shape \[64\], got \[63\]"),
        (2, bias[:1].expand(64), "bias: expected a contiguous tensor"),
        (3, [1.0], "scale and shift: expected 3 values each, got 1 and 3"),
        (4, [1.0] * 4, "scale and shift: expected 3 values each, got 3 and 4"),
        (6, y.float(), "y: expected float16, got float32"),
        (6, y[:, :, 1:], r"y: expected shape \[2, 64, 8, 8\], got \[2, 64, 7, 8\]"),
        (6, y.contiguous(), "y: expected channels_last or a channel slice of it"),
    ]:
        arguments = list(good)
        arguments[i] = bad
        with pytest.raises(RuntimeError, match=f"stem_conv_pool: {message}"):
            ops.stem_conv_pool(*arguments)
    with pytest.raises(RuntimeError, match=r"stem_fits: weight: expected .*, got float64"):
        ops.stem_fits(torch.zeros(1, dtype=torch.float64))


@needs_emulator
def test_opcheck():
    x, parameters = images(1, 15, 15), ConvPool.random(torch.float16)
    y = torch.zeros(1, 4, 4, 64, dtype=torch.float16).permute(0, 3, 1, 2)
    op = kernel_ops("emulator").stem_conv_pool.default
    torch.library.opcheck(op, (x, *parameters.arguments(HALF, "cpu"), y))
