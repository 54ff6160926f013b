"""What conv_wgrad keeps to besides values: NaN, repeatability, empty batches, errors, schema."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_as_good_as_eager
from conv_cases import MATH, workspace_of
from conv_wgrad_cases import (
    Wgrad,
    arguments,
    by_windows,
    group_operands,
    plain,
    prepared,
    run,
)
from kernel_devices import each_device, kernel_ops, kernels_on, needs_emulator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

each_math = pytest.mark.parametrize("math", MATH)

SPOILED = [
    Wgrad(8, 16, 7, 6, 3, (3, 3), padding=(1, 1)),
    Wgrad(3, 8, 7, 6, 3, (5, 3), (2, 1), (2, 0)),
    Wgrad(16, 21, 7, 6, 3),
    Wgrad(8, 16, 7, 6, 3, prologue="pool"),
    Wgrad(13, 8, 7, 6, 3, prologue="pool", x="misaligned", grad="misaligned"),
    Wgrad(8, 16, 7, 6, 3, (3, 3), padding=(1, 1), prologue="batch_norm"),
]
REPEATED = [
    Wgrad(40, 56, 28, 28, 2, segments=(24, 24, 8)),
    Wgrad(40, 16, 28, 28, 2, prologue="pool"),
    Wgrad(24, 32, 28, 28, 2, (3, 3), padding=(1, 1), prologue="batch_norm"),
]


# NaN


@each_device
@each_math
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("operand", ["x", "grad"])
def test_nan_reaches_the_products_that_hold_it(device, math, split, operand):
    """Those and nothing else: not what lies behind the last pixel, nor other images."""
    dtype, exact = MATH[math]
    for n, h, w in ((1, 0, 0), (1, 2, 3), (2, -1, -1)):
        tensors = group_operands(SPOILED, dtype)
        for t in tensors:
            spoiled = getattr(t, operand)
            spoiled[n, spoiled.shape[1] // 2, h, w] = torch.nan
        workspace = workspace_of(device) if split else None
        with kernels_on(device, seed=n):
            results = run(SPOILED, tensors, device, exact, workspace)
        for case, t, dw in zip(SPOILED, tensors, results, strict=True):
            expected = by_windows(case, t.grad, prepared(case, t.x, t.batch_norm)).isnan()
            assert expected.any() and not expected.all()
            assert torch.equal(dw.isnan(), expected), case


@each_device
def test_nan_in_the_batch_norm_spoils_its_channel(device):
    case = SPOILED[-1]
    tensors = group_operands([case], torch.float16)
    for row in range(4):
        tensors[0].batch_norm[row, row] = torch.nan
    with kernels_on(device, counting=False):
        (dw,) = run([case], tensors, device)
    assert dw[:, :4].isnan().all() and dw[:, 4:].isfinite().all()


@each_device
def test_large_mean_and_small_variance(device):
    """1e4 +- 1e-2 in float32: the mean is subtracted before anything is scaled."""
    case = Wgrad(8, 8, 9, 9, 2, prologue="batch_norm")
    (t,) = tensors = group_operands([case], torch.float32)
    t.x.mul_(1e-2).add_(1e4)
    t.batch_norm[0], t.batch_norm[1] = 1e4, 100
    with kernels_on(device, counting=False):
        (dw,) = run([case], tensors, device, exact=True)
    reference = by_windows(case, t.grad, prepared(case, t.x.double(), t.batch_norm))
    eager = plain(case, t.grad, prepared(case, t.x, t.batch_norm))
    assert_as_good_as_eager(dw, eager, reference)


# Repeatability and empty batches


@needs_emulator
@each_math
def test_the_same_bits_for_every_seed(math):
    dtype, exact = MATH[math]
    tensors = group_operands(REPEATED, dtype)
    workspace = workspace_of("emulator")
    results = []
    for seed in range(4):
        with kernels_on("emulator", seed=seed, workers=1 + seed % 2) as launches:
            results.append(run(REPEATED, tensors, "emulator", exact, workspace))
        assert launches[0]["grid"][0] > 16
        assert not workspace[: 16 << 10].any()
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@each_device
@pytest.mark.parametrize("prologue", ["none", "batch_norm", "pool"])
def test_no_images_give_zeros(device, prologue):
    cases = [Wgrad(n=0, prologue=prologue), Wgrad(n=0, c=5, k=21, segments=(16, 5), master=True)]
    with kernels_on(device, counting=False):
        results = run(cases, group_operands(cases, torch.float16), device, False)
    assert all((dw == 0).all() for dw in results)


# Errors


def call_with(**changes: Any) -> Callable[[], None]:
    """Two good problems, but for the changes; a function changes what was there."""
    cases = [
        Wgrad(8, 24, segments=(8, 16)),
        Wgrad(16, 8, kernel=(3, 3), padding=(1, 1), prologue="batch_norm"),
    ]
    good = arguments(cases, group_operands(cases, torch.float32), "emulator")
    for name, change in changes.items():
        good[name] = change(good[name]) if callable(change) else change
    return lambda: kernel_ops("emulator").conv_wgrad(*good.values())


def at(index: int, change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Changes one entry of a list."""
    return lambda values: [change(v) if i == index else v for i, v in enumerate(values)]


ERRORS = [
    ({"x": []}, r"x: expected 1 to 8 tensors, got 0"),
    ({"x": at(0, lambda x: x.double())}, r"x\[0\]: expected float16 or .*, got float64"),
    ({"x": at(1, lambda x: x.half())}, r"x\[1\]: expected float32, got float16"),
    ({"x": at(1, lambda x: x[:, :, :0])}, r"x\[1\]: expected .* at least 1, .*\[1, 16, 0, 5\]"),
    ({"grads": lambda g: g[:1]}, r"grads: expected 2 entries, got 1"),
    ({"grads": at(1, lambda g: g.half())}, r"grads\[1\]: expected float32, got float16"),
    ({"grads": at(1, lambda g: g[0])}, r"grads\[1\]: expected 4D input, got 3D"),
    (
        {"grads": at(1, lambda g: g[:, :, 1:])},
        r"grads\[1\]: expected shape \[1, 8, 6, 5\], got \[1, 8, 5, 5\]",
    ),
    ({"batch_norms": lambda b: b[:1]}, r"batch_norms: expected 2 entries, got 1"),
    ({"batch_norms": at(1, lambda b: b.half())}, r"batch_norms\[1\]: expected float32, got"),
    (
        {"batch_norms": at(1, lambda b: b[:, :8])},
        r"batch_norms\[1\]: expected shape \[4, 16\], got \[4, 8\]",
    ),
    (
        {"batch_norms": at(1, lambda b: b.t().contiguous().t())},
        r"batch_norms\[1\]: expected a contiguous tensor",
    ),
    ({"strides": [1, 1]}, r"strides: expected 4 entries, got 2"),
    ({"strides": [1, 0, 1, 1]}, r"strides\[0\]: expected 1 to 4096, got 0"),
    ({"paddings": [0, -1, 1, 1]}, r"paddings\[0\]: expected 0 to 4096, got -1"),
    ({"pools": [True]}, r"pools: expected 2 entries, got 1"),
    ({"pools": [False, True]}, r"pools\[1\]: expected false unless kernel 1x1, stride 1"),
    (
        {"pools": [True, False], "batch_norms": at(0, lambda _: torch.zeros(4, 8))},
        r"pools\[0\]: expected false where batch_norms has an entry",
    ),
    ({"segments": [2]}, r"segments: expected 2 entries, got 1"),
    ({"segments": [4, 1]}, r"segments\[0\]: expected 1 to 3, got 4"),
    ({"segments": [2, 2]}, r"outputs: expected as many tensors as all segments, got 3"),
    ({"segments": [1, 1]}, r"grads\[0\]: expected shape \[1, 8, 6, 5\], got \[1, 24, 6, 5\]"),
    ({"outputs": lambda y: [*y, y[0]]}, r"outputs: expected 3 entries, got 4"),
    (
        {"outputs": at(1, lambda y: y.half())},
        r"outputs of problem \[0\]: expected float32, got float16",
    ),
    (
        {"outputs": at(2, lambda y: y[:, :8])},
        r"outputs of problem \[1\]: expected shape \[8, 16, 3, 3\], got \[8, 8, 3, 3\]",
    ),
    (
        {"outputs": at(2, lambda y: y.new_zeros(8, 16, 9, 3))},
        r"outputs of problem \[1\]: expected at most 8 for an input of 6 with padding 1, got 9",
    ),
    (
        {"outputs": at(2, lambda y: y[:, :, :0])},
        r"outputs of problem \[1\]: expected at least one filter with one tap",
    ),
    ({"workspace": torch.zeros(8)}, r"workspace: expected shape \[16793600\], got \[8\]"),
]


@needs_emulator
@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[e[1][:40] for e in ERRORS])
def test_bad_arguments(changes, message):
    with kernels_on("emulator") as launches:
        with pytest.raises(RuntimeError, match=rf"inception_ext::conv_wgrad: {message}"):
            call_with(**changes)()
        call_with()()
    assert len(launches) == 1


@needs_emulator
def test_a_device_without_the_shared_memory_is_an_error():
    with (
        pytest.raises(RuntimeError, match="inception_ext::conv_wgrad: launch: cudaError_t 801"),
        kernels_on("emulator", shared_limit=16 << 10),
    ):
        call_with()()


# What torch is told


def test_flops():
    case = Wgrad(16, 24, 9, 8, 2, (5, 3), (2, 1), (2, 1), segments=(8, 16))
    call = arguments([case, Wgrad()], group_operands([case, Wgrad()], torch.float32), "cpu")
    on_meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), call)
    with FlopCounterMode(display=False) as counter:
        torch.ops.inception_ext.conv_wgrad(*on_meta.values())
    assert counter.get_total_flops() == 2 * (case.macs + Wgrad().macs)


@needs_emulator
def test_opcheck():
    cases = [REPEATED[0], SPOILED[-1]]
    call = arguments(cases, group_operands(cases, torch.float32), "emulator")
    call["workspace"] = workspace_of("emulator")
    for dw in call["outputs"]:
        dw.zero_()
    torch.library.opcheck(torch.ops.inception_ext_emulated.conv_wgrad.default, (*call.values(),))
