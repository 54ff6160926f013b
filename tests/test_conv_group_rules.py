"""What conv_group keeps to besides values: NaN, repeatability, counters, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conv_cases import MATH, workspace_of
from conv_group_cases import (
    Conv,
    arguments,
    assert_right,
    group_operands,
    operands,
    plain,
    run,
)
from kernel_devices import each_device, kernel_ops, kernels_on, needs_emulator
from torch import Tensor

each_math = pytest.mark.parametrize("math", MATH)

# An Inception module in small: the three merged 1x1 and the pool projection, then the two 3x3.
FIRST = [
    Conv(32, 56, 9, 7, 2, segments=(24, 24, 8), x="sliced", y="sliced"),
    Conv(32, 16, 9, 7, 2, pool=True, x="sliced", y="sliced"),
]
SECOND = [
    Conv(24, 32, 9, 7, 2, (3, 3), padding=(1, 1), y="sliced"),
    Conv(8, 16, 9, 7, 2, (3, 3), padding=(1, 1), y="sliced"),
]
LAUNCHES = {
    "module's first": FIRST,
    "module's second": SECOND,
    "strided": [Conv(16, 24, 9, 8, 2, (5, 3), (2, 1), (2, 1)), Conv(48, 8, 4, 4, relu=False)],
}

# NaN and infinity


SPOILED = [
    Conv(8, 16, 7, 6, 3, (3, 3), padding=(1, 1)),
    Conv(3, 8, 7, 6, 3, (5, 3), (2, 1), (2, 0)),
    Conv(16, 21, 7, 6, 3, relu=False),
    Conv(8, 16, 7, 6, 3, pool=True),
    Conv(13, 8, 7, 6, 3, pool=True, x="misaligned", y="misaligned"),
]


def windows_with(conv: Conv, n: int, h: int, w: int) -> Tensor:
    """Which outputs [N, P, Q] read the pixel."""
    marked = torch.zeros(conv.n, 1, conv.h, conv.w)
    marked[n, 0, h, w] = 1
    ones = torch.ones(1, 1, *conv.kernel)
    return plain(Conv(**{**vars(conv), "relu": False}), marked, ones, torch.zeros(1))[:, 0] > 0


@each_device
@each_math
@pytest.mark.parametrize("split", [False, True])
def test_nan_reaches_the_windows_that_hold_it(device, math, split):
    """All channels of those, and nothing else: not the neighbours, the padding or other images."""
    dtype, exact = MATH[math]
    for n, h, w in ((1, 0, 0), (1, 6, 5), (0, 3, 2), (2, 2, 5)):
        spoiled, clean = group_operands(SPOILED, dtype), group_operands(SPOILED, dtype)
        for conv, a, b in zip(SPOILED, spoiled, clean, strict=True):
            a.x[n, conv.c // 2, h, w] = torch.nan
            b.x[n, conv.c // 2, h, w] = -100  # no maximum
        workspace = workspace_of(device) if split else None
        with kernels_on(device, seed=h):
            results = run(SPOILED, spoiled, device, exact, workspace)
            others = run(SPOILED, clean, device, exact, workspace)
        for conv, y, other in zip(SPOILED, results, others, strict=True):
            hit = windows_with(conv, n, h, w)[:, None].expand_as(y)
            assert hit.any() and torch.equal(y.isnan(), hit)
            assert torch.equal(y[~hit], other[~hit])


@each_device
@each_math
def test_infinity_as_in_torch(device, math):
    dtype, exact = MATH[math]
    tensors = group_operands(SPOILED, dtype)
    for t in tensors:
        t.x[1, 0, 3, 3], t.x[2, 1, 0, 1] = torch.inf, -torch.inf
    with kernels_on(device, counting=False):
        results = run(SPOILED, tensors, device, exact)
    for conv, t, y in zip(SPOILED, tensors, results, strict=True):
        reference = plain(conv, t.x.double(), t.weight.double(), t.bias.double())
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(reference))


@each_device
@each_math
def test_nan_in_parameters_spoils_its_channel(device, math):
    dtype, exact = MATH[math]
    conv = Conv(8, 21, 5, 4, 2, relu=True, segments=(4, 17))
    tensors = operands(conv, dtype)
    tensors.bias[3], tensors.weight[10, 5] = torch.nan, torch.nan
    with kernels_on(device, counting=False):
        (y,) = run([conv], [tensors], device, exact)
    spoiled = y.isnan().transpose(0, 1).flatten(1)
    assert spoiled[[3, 10]].all() and not spoiled[[i for i in range(21) if i not in (3, 10)]].any()


# Repeatability and empty batches


@needs_emulator
@each_math
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_same_bits_for_every_seed(math, name):
    dtype, exact = MATH[math]
    tensors = group_operands(LAUNCHES[name], dtype)
    results = []
    for seed in range(6):
        with kernels_on("emulator", seed=seed, workers=1 + seed % 2):
            results.append(run(LAUNCHES[name], tensors, "emulator", exact))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@each_device
def test_empty_batch(device):
    """Launches nothing; beside problems with images, it takes no part."""
    empty = [Conv(n=0), Conv(8, 24, n=0, segments=(8, 16), pool=True)]
    with kernels_on(device) as launches:
        for y in run(empty, group_operands(empty, torch.float16), device):
            assert y.numel() == 0
    assert launches == []
    convs = [empty[0], Conv(16, 8), empty[1]]
    tensors = group_operands(convs, torch.float16)
    with kernels_on(device) as launches:
        results = run(convs, tensors, device)
    assert_right(convs[1], tensors[1], results[1], "float16", device)
    assert [launch["grid"] for launch in launches] == [(1, 1, 1)] * len(launches)


# Counters


@needs_emulator
@each_math
@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("capability", [75, 90])
def test_counters(math, name, capability):
    """Each tensor once, no bank conflict, and of padding the last fragments alone."""
    dtype, exact = MATH[math]
    convs = LAUNCHES[name]
    tensors = group_operands(convs, dtype)
    with kernels_on("emulator", capability=capability) as launches:
        run(convs, tensors, "emulator", exact)
    (launch,) = launches
    assert launch["bank_conflicts"] == 0, launch["conflict_places"]
    expected: dict[str, dict[str, Any]] = {}
    for conv, t in zip(convs, tensors, strict=True):
        pixels = conv.n * conv.output_size[0] * conv.output_size[1]
        for operand, read, written in (
            ("x", t.x.numel() * dtype.itemsize, 0),
            ("weight", t.weight.numel() * dtype.itemsize, 0),  # C is a multiple of 8
            ("bias", 4 * conv.k, 0),
            ("y", 0, pixels * conv.k * dtype.itemsize),
        ):
            total = expected.setdefault(operand, {"operand": operand, "read": 0, "written": 0})
            total["read"] += read
            total["written"] += written
    assert added_up(launch["touched"]) == expected
    assert launch["bytes_touched"] == sum(t["read"] + t["written"] for t in expected.values())
    assert launch["useful_macs"] == sum(conv.macs for conv in convs)
    scalar = "ScalarMath" in launch["kernel"]
    step_k = 16 // dtype.itemsize * (1 if scalar else 2)  # of an instruction
    assert launch["issued_macs"] == sum(padded_macs(conv, step_k) for conv in convs)


def added_up(touched: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By operand: those of all problems have one name."""
    result: dict[str, dict[str, Any]] = {}
    for entry in touched:
        total = result.setdefault(entry["operand"], dict(entry, read=0, written=0))
        total["read"] += entry["read"]
        total["written"] += entry["written"]
    return result


def padded_macs(conv: Conv, step_k: int) -> int:
    """In fragments of 16 pixels, 8 filters and step_k products."""
    m = conv.n * conv.output_size[0] * conv.output_size[1]
    k = conv.c * conv.kernel[0] * conv.kernel[1]
    return -(-m // 16) * 16 * (-(-conv.k // 8) * 8) * (-(-k // step_k) * step_k)


@needs_emulator
def test_bytes_of_an_inception_module():
    """5a of GoogLeNet: x once a launch, reduced tensors written and read, the concat written."""
    side, c, one, reduce3, three, reduce5, five, pool = 7, 832, 256, 160, 320, 32, 128, 128
    first = [
        Conv(c, one + reduce3 + reduce5, side, side, segments=(one, reduce3, reduce5)),
        Conv(c, pool, side, side, pool=True),
    ]
    second = [
        Conv(reduced, k, side, side, 1, (3, 3), padding=(1, 1))
        for reduced, k in ((reduce3, three), (reduce5, five))
    ]
    calls = [
        arguments(convs, group_operands(convs, torch.float16), "emulator")
        for convs in (first, second)
    ]
    calls[0]["x"][1] = calls[0]["x"][0]
    with kernels_on("emulator") as launches:
        for call in calls:
            kernel_ops("emulator").conv_group(*call.values())
    moved = sum(
        entry["read"] + entry["written"]
        for launch in launches
        for entry in launch["touched"]
        if entry["operand"] in ("x", "y")
    )
    out = one + three + five + pool
    assert len(launches) == 2
    assert moved == 2 * side * side * (c + 2 * (reduce3 + reduce5) + out)


@needs_emulator
@each_math
def test_splitting_k_issues_no_more_products(math):
    dtype, exact = MATH[math]
    conv = Conv(1664, 40, 3, 5)
    tensors = [operands(conv, dtype)]
    whole, split = (
        counted(lambda memory=memory: run([conv], tensors, "emulator", exact, memory))
        for memory in (None, workspace_of("emulator"))
    )
    assert whole["grid"] == (1, 1, 1) and split["grid"][0] > 1
    assert whole["issued_macs"] == split["issued_macs"]
    assert split["bank_conflicts"] == 0, split["conflict_places"]


def counted(call: Callable[[], Any]) -> dict[str, Any]:
    """The one launch of a call."""
    with kernels_on("emulator") as launches:
        call()
    (launch,) = launches
    return launch


# Errors


def call_with(**changes: Any) -> Callable[[], None]:
    """Two good problems, but for the changes; a function changes what was there."""
    convs = [Conv(8, 24, segments=(8, 16)), Conv(16, 8, kernel=(3, 3), padding=(1, 1))]
    good = arguments(convs, group_operands(convs, torch.float32), "emulator")
    for name, change in changes.items():
        good[name] = change(good[name]) if callable(change) else change
    return lambda: kernel_ops("emulator").conv_group(*good.values())


def at(index: int, change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Changes one entry of a list."""
    return lambda values: [change(v) if i == index else v for i, v in enumerate(values)]


def nchw(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.contiguous_format)


ERRORS = [
    ({"x": []}, r"x: expected 1 to 8 tensors, got 0"),
    ({"x": lambda x: x * 5}, r"x: expected 1 to 8 tensors, got 10"),
    ({"x": at(0, lambda x: x.double())}, r"x\[0\]: expected float16 or .*, got float64"),
    ({"x": at(1, lambda x: x.half())}, r"x\[1\]: expected float32, got float16"),
    ({"x": at(1, lambda x: x[0])}, r"x\[1\]: expected 4D input, got 3D of shape \[16, 6, 5\]"),
    ({"x": at(1, lambda x: x[:, :, :0])}, r"x\[1\]: expected .* at least 1, .*\[1, 16, 0, 5\]"),
    ({"x": at(0, lambda x: x[:, :0])}, r"x\[0\]: expected channels, .*\[1, 0, 6, 5\]"),
    (
        {"x": at(0, lambda x: x[..., :1].expand(1, 8, 6, 8193))},
        r"x\[0\]: expected .* at most 8192 pixels a side, got shape \[1, 8, 6, 8193\]",
    ),
    ({"weights": lambda w: w[:1]}, r"weights: expected 2 entries, got 1"),
    ({"weights": at(1, lambda w: w.half())}, r"weights\[1\]: expected float32, got float16"),
    ({"weights": at(1, lambda w: w[:, None])}, r"weights\[1\]: expected 2D input, got 3D"),
    (
        {"weights": at(1, lambda w: w[:, :-8].contiguous())},
        r"weights\[1\]: expected shape \[8, 144\], got \[8, 136\]",
    ),
    ({"weights": at(1, lambda w: w.t().contiguous().t())}, r"weights\[1\]: expected a contiguous"),
    (
        {"weights": at(0, lambda w: torch.zeros(24 * 8 + 1)[1:].view(24, 8))},
        r"weights\[0\]: expected a contiguous tensor at a multiple of 16 bytes",
    ),
    ({"weights": at(1, lambda w: w[:0])}, r"weights\[1\]: expected at least one filter, got shape"),
    ({"biases": lambda b: [*b, b[0]]}, r"biases: expected 2 entries, got 3"),
    ({"biases": at(0, lambda b: b[:23])}, r"biases\[0\]: expected shape \[24\], got \[23\]"),
    ({"biases": at(0, lambda b: b.half())}, r"biases\[0\]: expected float32, got float16"),
    (
        {"biases": at(0, lambda b: b.repeat_interleave(2)[::2])},
        r"biases\[0\]: expected a contiguous tensor",
    ),
    ({"kernel_sizes": [1, 1, 3]}, r"kernel_sizes: expected 4 entries, got 3"),
    ({"kernel_sizes": [1, 1, 0, 3]}, r"kernel_sizes\[1\]: expected 1 to 4096, got 0"),
    ({"kernel_sizes": [1, 1, 3, 5000]}, r"kernel_sizes\[1\]: expected 1 to 4096, got 5000"),
    (
        {"kernel_sizes": [1, 1, 9, 3]},
        r"kernel_sizes\[1\]: expected at most 8 for an input of 6 with padding 1, got 9",
    ),
    ({"strides": [1, 1]}, r"strides: expected 4 entries, got 2"),
    ({"strides": [1, 0, 1, 1]}, r"strides\[0\]: expected 1 to 4096, got 0"),
    ({"paddings": [0] * 5}, r"paddings: expected 4 entries, got 5"),
    ({"paddings": [0, -1, 1, 1]}, r"paddings\[0\]: expected 0 to 4096, got -1"),
    ({"pools": [True]}, r"pools: expected 2 entries, got 1"),
    ({"pools": [False, True]}, r"pools\[1\]: expected false unless kernel 1x1, stride 1"),
    ({"relus": [True] * 3}, r"relus: expected 2 entries, got 3"),
    ({"segments": [2]}, r"segments: expected 2 entries, got 1"),
    ({"segments": [0, 1]}, r"segments\[0\]: expected 1 to 3, got 0"),
    ({"segments": [4, 1]}, r"segments\[0\]: expected 1 to 3, got 4"),
    ({"segments": [2, 2]}, r"outputs: expected as many tensors as all segments, got 3"),
    ({"segments": [1, 1]}, r"outputs of problem \[0\]: expected 24 channels together, got 8"),
    ({"outputs": lambda y: [*y, y[0]]}, r"outputs: expected 3 entries, got 4"),
    ({"outputs": at(1, lambda y: y.half())}, r"outputs of problem \[0\]: .* float32, got float16"),
    (
        {"outputs": at(2, lambda y: y[:, :, :5])},
        r"outputs of problem \[1\]: expected shape \[1, 8, 6, 5\], got \[1, 8, 5, 5\]",
    ),
    ({"outputs": at(2, lambda y: y[0])}, r"outputs of problem \[1\]: expected 4D input, got 3D"),
    ({"outputs": at(2, nchw)}, r"outputs of problem \[1\]: expected a channels_last tensor"),
    ({"workspace": torch.zeros(8)}, r"workspace: expected shape \[16793600\], got \[8\]"),
    (
        {"workspace": lambda _: workspace_of("emulator").char()},
        r"workspace: expected uint8, got int8",
    ),
    (
        {"workspace": lambda _: torch.zeros(2 * 16793600, dtype=torch.uint8)[::2]},
        r"workspace: expected a contiguous tensor",
    ),
]


@needs_emulator
@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_bad_arguments(changes, message):
    with kernels_on("emulator") as launches:
        with pytest.raises(RuntimeError, match=rf"inception_ext::conv_group: {message}"):
            call_with(**changes)()
        call_with()()
    assert len(launches) == 1


@needs_emulator
def test_a_device_without_the_shared_memory_is_an_error():
    with (
        pytest.raises(RuntimeError, match="inception_ext::conv_group: launch: cudaError_t 801"),
        kernels_on("emulator", shared_limit=16 << 10),
    ):
        call_with()()
