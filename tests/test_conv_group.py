"""conv_group against torch: every window, channel count, layout, segment, prologue and split."""

import itertools
from dataclasses import replace

import pytest
import torch
from conv_cases import MATH, workspace_of
from conv_group_cases import (
    Conv,
    arguments,
    assert_right,
    check,
    group_operands,
    operands,
    plain,
    run,
)
from kernel_devices import (
    ARRANGEMENTS,
    each_device,
    kernel_ops,
    kernels_on,
    needs_emulator,
    torch_device,
)

KERNELS = list(itertools.product((1, 3, 5, 7), repeat=2))
CHANNELS = [1, 3, 8, 13, 21, 24, 48, 216]  # multiples of 8 and odd ones, turn by turn
OUTPUTS = ["channels_last", "sliced", "misaligned"]
# Few tiles and many products each, so that K is split.
SMALL = [Conv(c=1664, k=40, h=5, w=3), Conv(c=208, k=24, h=4, w=5, kernel=(3, 3), padding=(1, 1))]

each_math = pytest.mark.parametrize("math", MATH)


def windows(kernel: tuple[int, int]) -> list[Conv]:
    """Eight problems of one filter size: strides, paddings 0 to 3 and channels take turns."""
    first = KERNELS.index(kernel)
    paddings = list(itertools.product(range(4), repeat=2))
    convs = []
    for i, stride in enumerate(itertools.product((1, 2), (1, 2), (0, 1))):
        padding = paddings[(5 * first + 7 * i) % 16]
        h, w = (max(1, kernel[j] - 2 * padding[j]) + 2 + (i + j) % 3 for j in range(2))
        c, k = CHANNELS[(first + i) % 7], CHANNELS[(2 * first + 3 * i) % 7]
        convs.append(Conv(c, k, h, w, 1 + i % 2, kernel, stride[:2], padding, relu=i % 4 != 0))
    return convs


@each_device
@each_math
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_windows(device, math, kernel):
    with kernels_on(device, seed=1) as launches:
        check(windows(kernel), math, device)
    assert len(launches) == (1 if device == "emulator" else 0)


def test_windows_hold_every_padding_and_stride():
    convs = [conv for kernel in KERNELS for conv in windows(kernel)]
    assert {conv.padding for conv in convs} == set(itertools.product(range(4), repeat=2))
    for kernel in KERNELS:
        strides = {conv.stride for conv in windows(kernel)}
        assert strides == set(itertools.product((1, 2), repeat=2))


@each_device
@each_math
@pytest.mark.parametrize("c", CHANNELS)
def test_channels(device, math, c):
    """Every C with every K, in one group."""
    convs = [Conv(c, k, 5, 7, 2, relu=k != 24) for k in CHANNELS]
    with kernels_on(device, seed=2):
        check(convs, math, device)


@each_device
@each_math
@pytest.mark.parametrize("x", ARRANGEMENTS)
def test_layouts(device, math, x):
    """x and outputs sliced and misaligned; what lies around the outputs stays as it was."""
    convs = [
        Conv(c, 48, 5, 4, 2, (3, 3), padding=(1, 1), segments=segments, x=x, y=y)
        for y in OUTPUTS
        for c, segments in ((16, (16, 24, 8)), (13, (4, 27, 17)))
    ]
    with kernels_on(device, seed=3):
        check(convs, math, device)


@each_device
@each_math
@pytest.mark.parametrize("segments", [(1, 2, 3), (7, 9), (8, 1, 40), (130, 70, 16), (0, 5, 3)])
def test_segments(device, math, segments):
    convs = [Conv(8, sum(segments), 4, 5, 2, segments=segments, y=y) for y in OUTPUTS]
    with kernels_on(device, seed=4):
        check(convs, math, device)


@each_device
def test_segments_in_one_concat(device):
    """Two problems write neighbouring slices of one tensor, as the branches of a module do."""
    convs = [Conv(16, 40, segments=(24, 16)), Conv(8, 24, kernel=(3, 3), padding=(1, 1))]
    tensors = group_operands(convs, torch.float16)
    call = arguments(convs, tensors, device)
    concat = torch.full((1, 6, 5, 64), torch.nan, dtype=torch.float16, device=torch_device(device))
    concat = concat.permute(0, 3, 1, 2)
    call["outputs"][::2] = [concat[:, :24], concat[:, 40:]]
    with kernels_on(device, seed=5):
        kernel_ops(device).conv_group(*call.values())
    concat = concat.cpu()
    assert concat[:, 24:40].isnan().all()
    whole = torch.cat([concat[:, :24], call["outputs"][1].cpu()], 1)
    assert_right(convs[0], tensors[0], whole, "float16", device)
    assert_right(convs[1], tensors[1], concat[:, 40:], "float16", device)


@each_device
@each_math
@pytest.mark.parametrize("size", range(1, 9))
def test_group_sizes(device, math, size):
    """Problems of different batch, image and filter size; each is as if it were alone."""
    convs = [
        Conv(8 * (1 + i % 3), 24 - 5 * (i % 2), 3 + i, 8 - i, 1 + i % 3, (1 + 2 * (i % 2),) * 2)
        for i in range(6)
    ]
    convs = [*convs, Conv(pool=True), Conv(1, 1, 1, 1)][:size]
    with kernels_on(device, seed=6):
        group = check(convs, math, device)
        alone = [check([conv], math, device, seed=i)[0] for i, conv in enumerate(convs)]
    for together, single in zip(group, alone, strict=True):
        assert torch.equal(together, single)


POOLED = [
    *(Conv(h=h, w=w, n=2, pool=True) for h, w in ((1, 1), (1, 9), (9, 1), (2, 2), (7, 5))),
    Conv(13, 21, 5, 3, 3, pool=True, x="misaligned", y="misaligned"),
    Conv(72, 32, 15, 17, pool=True, x="sliced"),
    Conv(3, 4, 6, 6, 2, pool=True, relu=False, x="nchw"),
]


@each_device
@each_math
def test_max_pool_prologue(device, math):
    """Odd sizes, single rows and columns, several images in a tile, borders within a tile."""
    with kernels_on(device, seed=7):
        check(POOLED, math, device)


@each_device
@each_math
def test_max_pool_prologue_of_negative_pixels(device, math):
    """What lies outside of the image takes no part: a zero would win here."""
    dtype, exact = MATH[math]
    tensors = group_operands(POOLED, dtype)
    for t in tensors:
        t.x = -t.x.abs() - 1
    with kernels_on(device, seed=8):
        results = run(POOLED, tensors, device, exact)
    for conv, t, y in zip(POOLED, tensors, results, strict=True):
        assert_right(conv, t, y, math, device)


@needs_emulator
@each_math
def test_max_pool_of_images_too_wide_for_shared_memory(math):
    """A kernel of its own pools these; the others of the group keep the prologue."""
    convs = [Conv(h=3, w=40, pool=True), Conv(h=4, w=6, pool=True), Conv(13, 5, 2, 60, pool=True)]
    for limit, own in ((227 << 10, 0), (60 << 10, 1), (48 << 10, 2), (38 << 10, 3)):
        with kernels_on("emulator", shared_limit=limit) as launches:
            check(convs, math, "emulator")
        assert [launch["op"] for launch in launches[:-1]] == ["conv_group"] * own
        assert all(launch["kernel"].startswith("max_pool") for launch in launches[:-1])
        assert launches[-1]["kernel"].startswith("conv_group_kernel")
        assert launches[-1]["shared_bytes"] <= limit


@each_device
@pytest.mark.parametrize("math", ["float16", "float32"])
def test_images_of_every_width_around_the_prologue_s_limit(device, math):
    """On a GPU the limit is that of the device."""
    convs = [Conv(8, 8, 2, w, pool=True) for w in (300, 600, 1200)]
    with kernels_on(device, seed=9):
        check(convs, math, device)


@each_device
@each_math
def test_split_k(device, math):
    """Where K is split, the result repeats bit for bit, and the workspace is ready for the next."""
    dtype, exact = MATH[math]
    workspace = workspace_of(device)
    counters = workspace[: 16 << 10]
    tensors = group_operands(SMALL, dtype)
    results = []
    for seed in range(12):
        with kernels_on(device, seed=seed, workers=1 + seed % 3) as launches:
            results.append(run(SMALL, tensors, device, exact, workspace))
        assert not counters.any()
        if device == "emulator":
            assert launches[0]["grid"][0] > 8
            assert {"counters", "partials"} < {t["operand"] for t in launches[0]["touched"]}
    for conv, t, y in zip(SMALL, tensors, results[0], strict=True):
        assert_right(conv, t, y, math, device)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
    with kernels_on(device, counting=False):  # other sizes on what the calls before left there
        check([Conv(c=480, k=70, h=3, w=3, y="misaligned")], math, device, workspace)


@each_device
def test_without_workspace_k_is_not_split(device):
    with kernels_on(device) as launches:
        check(SMALL, "float16", device)
    for launch in launches:
        assert launch["grid"][0] == 2


SHAPES = {  # of the block's tile: sizes that call for it on a device of few multiprocessors
    0: (Conv(32, 256, 16, 16, 2), {"multiprocessors": 2}),
    1: (Conv(32, 56, 16, 16, 2), {"multiprocessors": 2}),
    2: (Conv(32, 56, 8, 8), {}),
}


@needs_emulator
@each_math
@pytest.mark.parametrize("shape", SHAPES)
def test_tile_shapes(math, shape):
    conv, settings = SHAPES[shape]
    convs = [conv, replace(conv, k=conv.k - 3, h=conv.h - 1, pool=True, x="sliced")]
    with kernels_on("emulator", **settings) as launches:
        check(convs, math, "emulator")
    # Scalar products have no largest tile.
    expected = max(shape, 1) if MATH[math][1] else shape
    assert launches[0]["kernel"].endswith(f", {expected}>"), launches[0]["kernel"]


@needs_emulator
@each_math
@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_capabilities(math, capability):
    """sm_75 copies at once, multiplies fp16 by m16n8k8, and bf16 and fp32 on the scalar units."""
    convs = [Conv(24, 40, 5, 4, 2, (3, 3), padding=(1, 1)), Conv(13, 9, 4, 6, pool=True)]
    dtype, exact = MATH[math]
    old = capability < 80 and dtype != torch.float16
    products = "ScalarMath" if exact or old else "TensorMath"
    element = {"float16": "__half", "bfloat16": "__nv_bfloat16"}.get(math, "float")
    tensors = group_operands(convs, dtype)
    with kernels_on("emulator", capability=capability) as launches:
        results = run(convs, tensors, "emulator", exact)
    assert f"{products}<{element}>" in launches[0]["kernel"]
    for conv, t, y in zip(convs, tensors, results, strict=True):
        assert_right(conv, t, y, "float32" if old and math == "tf32" else math, "emulator")


@needs_emulator
@pytest.mark.parametrize("math", ["bfloat16", "tf32"])
def test_exact_is_for_float32_alone(math):
    """16-bit products are exact as they are."""
    dtype, _ = MATH[math]
    with kernels_on("emulator") as launches:
        run([Conv()], [operands(Conv(), dtype)], "emulator", exact=True)
    expected = "TensorMath<__nv_bfloat16>" if math == "bfloat16" else "ScalarMath<float>"
    assert expected in launches[0]["kernel"]


@each_device
def test_offsets_beyond_32_bits(device):
    """Pixels 2^30 elements apart; only the pages in use take memory."""
    if device == "cuda":
        pytest.skip("takes memory on a GPU")
    conv = Conv(8, 8, 1, 4)
    tensors = operands(conv, torch.float16)
    step = 2**30 + 8
    x, y = (
        torch.empty(3 * step + 8, dtype=torch.float16).as_strided(
            (1, 8, 1, 4), (4 * step, 1, 4 * step, step)
        )
        for _ in range(2)
    )
    x.copy_(tensors.x)
    call = arguments([conv], [tensors], device)
    call["x"], call["outputs"] = [x], [y]
    with kernels_on(device, counting=False):
        kernel_ops(device).conv_group(*call.values())
    assert_right(conv, tensors, y.contiguous(), "float16", device)


@each_device
@each_math
def test_large_values_overflow_as_in_torch(device, math):
    """Sums beyond the dtype's range become infinities; ReLU takes the negative ones."""
    conv = Conv(8, 16, 3, 3)
    dtype, exact = MATH[math]
    t = operands(conv, dtype)
    t.x *= torch.finfo(dtype).max / 16
    t.x[:, 1:] = 0  # one product a sum: in float32 a sum may overflow on the way to a finite one
    t.weight *= 64
    with kernels_on(device, counting=False):
        for relu in (True, False):
            (y,) = run([replace(conv, relu=relu)], [t], device, exact)
            exact_values = (v.double() for v in (t.x, t.weight, t.bias))
            expected = plain(replace(conv, relu=relu), *exact_values).to(dtype)
            assert torch.equal(y.isinf(), expected.isinf()) and y.isinf().any()
