"""conv_wgrad, the weight gradients of a group of convolutions: values and what it counts."""

import pytest
import torch
from conv_cases import MATH, workspace_of
from conv_wgrad_cases import Wgrad, check, group_operands, run
from kernel_devices import each_device, kernels_on, needs_emulator

each_math = pytest.mark.parametrize("math", MATH)

# An Inception module in small: the three merged 1x1 and the pool projection; the two 3x3.
FIRST = [
    Wgrad(32, 56, 9, 7, 2, segments=(24, 24, 8), grad="sliced", master=True),
    Wgrad(32, 16, 9, 7, 2, prologue="pool", out="channels_last"),
]
SECOND = [
    Wgrad(24, 32, 9, 7, 2, (3, 3), padding=(1, 1), prologue="batch_norm", x="sliced"),
    Wgrad(
        *(8, 16, 9, 7, 2, (3, 3)),
        padding=(1, 1),
        prologue="batch_norm",
        grad="sliced",
        out="channels_last",
    ),
]
KERNELS = [
    Wgrad(16, 24, 7, 6, 2, kernel, stride, padding, out=out)
    for kernel, stride, padding, out in (
        ((1, 1), (1, 1), (0, 0), "contiguous"),
        ((1, 1), (2, 2), (0, 0), "channels_last"),
        ((3, 3), (1, 1), (1, 1), "sliced"),
        ((3, 3), (2, 2), (0, 0), "channels_last"),
        ((5, 5), (1, 1), (2, 2), "contiguous"),
        ((5, 3), (2, 1), (2, 0), "channels_last"),
        ((7, 7), (2, 2), (3, 3), "channels_last"),
        ((1, 7), (1, 2), (0, 3), "sliced"),
    )
]
ODD = [
    Wgrad(3, 64, 17, 15, 1, (7, 7), (2, 2), (3, 3)),
    Wgrad(13, 5, 6, 5, 2, (3, 3), padding=(1, 1), prologue="batch_norm"),
    Wgrad(7, 21, 6, 5, 2, prologue="pool", segments=(4, 16, 1)),
    Wgrad(24, 19, 6, 5, 2, (3, 3), padding=(1, 1), segments=(3, 16)),
    Wgrad(16, 24, 6, 5, 2, x="misaligned"),
    Wgrad(16, 24, 6, 5, 2, (3, 3), prologue="batch_norm", x="misaligned", grad="misaligned"),
    Wgrad(16, 24, 6, 5, 2, prologue="pool", x="misaligned", grad="nchw", out="sliced"),
    Wgrad(1, 1, 1, 1, 1),
]
LONG = [
    Wgrad(24, 40, 28, 28, 3, (3, 3), padding=(1, 1), prologue="batch_norm"),
    Wgrad(72, 16, 28, 28, 3, prologue="pool", master=True),
]
GROUPS = {
    "module's first": FIRST,
    "module's second": SECOND,
    "kernels": KERNELS,
    "odd": ODD,
    "long": LONG,
    "longer": [Wgrad(3, 16, 112, 112, 1, (3, 3), padding=(1, 1), master=True)],
    "wide": [Wgrad(160, 200, 5, 5, 2), Wgrad(48, 136, 4, 4, 2, (3, 3), padding=(1, 1))],
    "pooled": [
        Wgrad(40, 8, h, w, n, prologue="pool")
        for h, w, n in ((1, 1, 1), (1, 9, 2), (9, 1, 2), (2, 2, 9), (3, 70, 1), (14, 14, 1))
    ],
}


@each_device
@each_math
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", GROUPS)
def test_values(device, math, split, name):
    workspace = workspace_of(device) if split else None
    with kernels_on(device, seed=len(name)) as launches:
        check(GROUPS[name], math, device, workspace)
    assert workspace is None or not workspace[: 16 << 10].any()  # the counters
    if launches:
        assert [launch["op"] for launch in launches] == ["conv_wgrad"]


@needs_emulator
@pytest.mark.parametrize("math", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["module's first", "module's second", "odd"])
def test_values_on_the_oldest_device(math, name):
    with kernels_on("emulator", capability=75, multiprocessors=40, shared_limit=64 << 10):
        check(GROUPS[name], math, "emulator", workspace_of("emulator"))


@needs_emulator
@each_math
@pytest.mark.parametrize("name", ["module's first", "module's second", "wide", "long"])
def test_shared_memory_without_bank_conflicts(math, name):
    with kernels_on("emulator") as launches:
        check(GROUPS[name], math, "emulator", workspace_of("emulator"))
    assert launches[0]["shared_passes"] > 0 and not launches[0]["conflict_places"]


@needs_emulator
@each_math
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_products_issued(math, multiprocessors):
    """Fragments of 16 rows (r, s, c), 8 filters and a few pixels, wherever one holds something."""
    step = {"float16": 16, "bfloat16": 16, "tf32": 8, "float32": 2}[math]
    up = lambda size, unit: -(-size // unit) * unit  # noqa: E731
    for case in (*FIRST, *SECOND, GROUPS["wide"][0], Wgrad(16, 24, 28, 28, 2, (3, 3))):
        with kernels_on("emulator", multiprocessors=multiprocessors) as launches:
            check([case], math, "emulator", workspace_of("emulator"))
        p, q = case.output_size
        rows = up(case.kernel[0] * case.kernel[1] * case.c, 16)
        assert launches[0]["useful_macs"] == case.macs
        assert launches[0]["issued_macs"] == rows * up(case.k, 8) * up(case.n * p * q, step)


@needs_emulator
def test_pooled_pixels_are_read_once():
    """Through the ring, the halo rows above and below aside."""
    case = Wgrad(64, 16, 28, 28, 2, prologue="pool")
    with kernels_on("emulator", multiprocessors=1) as launches:
        check([case], "float16", "emulator")
    pixels = case.n * case.h * case.w
    assert launches[0]["grid"] == (1, 1, 1)
    assert launches[0]["bytes_read"] == 2 * pixels * (case.c + case.k)


@needs_emulator
@pytest.mark.parametrize(
    ("math", "c", "k", "size", "shape"),
    [
        ("tf32", 128, 128, 96, 0),  # whose splits are no longer than a chain
        ("tf32", 128, 64, 96, 1),
        ("tf32", 64, 48, 96, 2),
        ("float32", 128, 64, 48, 1),
        ("float32", 64, 48, 48, 2),
    ],
)
def test_long_sums_in_every_tile(math, c, k, size, shape):
    case = Wgrad(c, k, size, size)
    with kernels_on("emulator", multiprocessors=1) as launches:
        check([case], math, "emulator", workspace_of("emulator"))
        check([case], math, "emulator")
    split, whole = launches
    assert split["kernel"].endswith(f" {shape}>")
    assert whole["grid"][0] == 1 + (shape == 0)  # that without splits has smaller tiles
    for launch in launches:  # laid aside
        assert any(t["operand"] == "partials" and t["written"] for t in launch["touched"])


@needs_emulator
@each_math
def test_splits_fill_the_device(math):
    """Two stages of sums, and single steps: few tiles, many pixels."""
    case = Wgrad(16, 16, 60, 60, 3, (3, 3), padding=(1, 1))
    tensors = group_operands([case], MATH[math][0])
    with kernels_on("emulator") as launches:
        check([case], math, "emulator", workspace_of("emulator"))
        run([case], tensors, "emulator", MATH[math][1])
    split, whole = (launch["grid"][0] for launch in launches)
    assert split > 16 * whole


@needs_emulator
@pytest.mark.parametrize(("width", "launched"), [(55, 1), (56, 2)])
def test_pooled_images_as_wide_as_conv_group_takes(width, launched):
    """A kernel of its own pools wider ones. These are the limits of the oldest device."""
    case = Wgrad(8, 8, 3, width, 1, prologue="pool")
    with kernels_on("emulator", shared_limit=64 << 10) as launches:
        check([case], "tf32", "emulator")
    assert len(launches) == launched


def test_the_cases_cover_what_they_name():
    cases = [case for group in GROUPS.values() for case in group]
    assert {case.prologue for case in cases} == {"none", "batch_norm", "pool"}
    assert {r for case in cases for r in case.kernel} == {1, 3, 5, 7}
    assert {case.master for case in cases} == {False, True}
    assert torch.float16 in {dtype for dtype, _ in MATH.values()}
