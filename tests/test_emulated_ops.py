"""Ops, autograd functions and whole networks on emulated CUDA kernels: inception_ext.testing."""

import copy
from collections import Counter

import pytest
import torch
from closeness import assert_network_as_good_as_eager
from kernel_devices import exact_products
from max_pool_cases import (
    DTYPES,
    Pool,
    assert_same_bits,
    gradient_bound,
    random_input,
    reference_backward,
    reference_forward,
)
from torch import Tensor

from inception_ext import _library, functional
from inception_ext.testing import emulated, emulator_error

needs_emulator = pytest.mark.skipif(
    emulator_error() is not None, reason=f"built without the emulator: {emulator_error()}"
)
ARRANGEMENTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nchw": lambda x: x.contiguous(),
    "channel_slice": lambda x: torch.nn.functional.pad(
        x, (0, 0, 0, 0, 8, 16), value=torch.nan
    ).contiguous(memory_format=torch.channels_last)[:, 8 : 8 + x.shape[1]],
}


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("pool", [Pool.square(3, 2, 0, True), Pool.square(3, 1, 1, False)], ids=str)
def test_max_pool(dtype, arrangement, pool):
    """Forward and backward through the gate, the autograd function and the glue."""
    values = random_input((2, 9, 7, 24), dtype, 0)
    x = ARRANGEMENTS[arrangement](values.permute(0, 3, 1, 2)).requires_grad_()
    expected, _ = reference_forward(values, pool)
    grad = random_input(tuple(expected.shape), dtype, 1, "normal")
    with emulated(seed=1) as launches:
        y = functional.max_pool(x, pool.kernel, pool.stride, pool.padding, pool.ceil_mode)
        y.backward(grad.permute(0, 3, 1, 2))
    assert_same_bits(nhwc(y.detach()).contiguous(), expected)
    assert x.grad is not None
    error = (nhwc(x.grad).double() - reference_backward(values, grad, pool)).abs()
    assert bool((error <= gradient_bound(values, grad, None, pool)).all())
    assert [launch["op"] for launch in launches] == ["max_pool_forward", "max_pool_backward"]


@needs_emulator
def test_counters_of_an_op():
    x = random_input((2, 8, 8, 16), torch.float16, 2).permute(0, 3, 1, 2)
    with emulated() as launches:
        y = functional.max_pool(x, 2, 2)
    (launch,) = launches
    assert launch["kernel"] == "max_pool_forward_kernel<__half, 8, 2, 2, false>"
    assert launch["touched"] == [
        {"operand": "x", "read": 2 * x.numel(), "written": 0},
        {"operand": "y", "read": 0, "written": 2 * y.numel()},
    ]
    assert launch["bytes_touched"] == 2 * (x.numel() + y.numel())
    assert launch["issued_macs"] == launch["bank_conflicts"] == launch["barriers"] == 0


@needs_emulator
def test_the_switch_is_off_outside():
    x = torch.randn(1, 8, 6, 6)
    assert _library.device_type(x) == "cpu"
    with emulated(workers=1) as launches:
        assert _library.device_type(x) == "cuda"
        assert functional.why_reference(x) == "no kernel for device cuda"
        with pytest.raises(ZeroDivisionError), emulated(seed=5, workers=1):
            functional.max_pool(x, 2, 2)
            raise ZeroDivisionError
        assert _library.device_type(x) == "cuda"
        functional.max_pool(x.double(), 2, 2)  # no kernel takes it
        functional.max_pool(x, 5, 2)
    assert launches == []  # the inner block has its own
    assert _library.device_type(x) == "cpu"


@needs_emulator
def test_settings_end_with_the_block():
    """Those of the device too, after errors as well; an unknown one changes nothing."""
    from inception_ext import _emulator

    before = _emulator.get_settings()
    changed = {"capability": 75, "multiprocessors": 40, "shared_limit": 64 << 10}
    with emulated(seed=9, **changed):
        assert (changed | {"seed": 9}).items() <= _emulator.get_settings().items()
        with pytest.raises(ZeroDivisionError), emulated(capability=80):
            raise ZeroDivisionError
        assert _emulator.get_settings()["capability"] == 75
    with pytest.raises(TypeError, match="no setting named clock"), emulated(clock=1):
        pass
    assert _emulator.get_settings() == before
    assert _library.device_type(torch.ones(1)) == "cpu"


@needs_emulator
def test_counting_can_be_turned_off():
    x = torch.randn(1, 8, 6, 6)
    with emulated(counting=False, checks=False) as launches:
        y = functional.max_pool(x, 2, 2)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2)) and launches == []


@needs_emulator
def test_empty_batch():
    x = torch.randn(0, 8, 6, 6, requires_grad=True)
    with emulated() as launches:
        functional.max_pool(x, 2, 2).sum().backward()
    assert launches == [] and x.grad is not None and x.grad.shape == x.shape


@needs_emulator
def test_checks_of_the_glue_are_errors():
    x = torch.randn(1, 8, 6, 6)
    ops = torch.ops.inception_ext_emulated
    with pytest.raises(RuntimeError, match="kernel_size: expected 2 or 3 with stride 1 or 2"):
        ops.max_pool_forward(x, [5, 5], [1, 1], [0, 0], False, False)
    with pytest.raises(RuntimeError, match="x: expected float16 or bfloat16 or float32"):
        ops.max_pool_forward(x.double(), [2, 2], [2, 2], [0, 0], False, False)


@needs_emulator
def test_compiled_with_fullgraph():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return functional.max_pool(x, 3, 2, 1).square()

    with emulated() as launches:
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.max_pool2d(x, 3, 2, 1).square())
    assert [launch["op"] for launch in launches] == ["max_pool_forward", "max_pool_backward"]
    torch.compiler.reset()


@needs_emulator
def test_opcheck():
    x = torch.randn(1, 8, 6, 6)
    arguments = ([2, 2], [2, 2], [0, 0], False, True)
    ops = torch.ops.inception_ext_emulated
    torch.library.opcheck(ops.max_pool_forward.default, (x, *arguments))


def training_step(model: torch.nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of one step."""
    model.train()
    outputs = model(x)
    sum(output.square().mean() for output in outputs).backward()
    results = dict(zip(outputs._fields, outputs, strict=True))
    results |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in results.items()}


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_googlenet_training_step(make_pair, dtype):
    """Forward and backward of the whole network, both auxiliary heads included."""
    ours, eager = make_pair(dtype)
    reference = copy.deepcopy(eager).double()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    with exact_products(), emulated() as launches:
        results = training_step(ours, x)
    expected = training_step(eager, x), training_step(reference, x.double())
    assert_network_as_good_as_eager(results, *expected)

    # Launches of each call: 3x3 filters of another layout than channels_last are packed first.
    counts = Counter(launch["op"] for launch in launches)
    assert counts == {
        "conv_chain_forward": 4 + 6 + 2 * 3,  # conv1 and pool; conv2, conv3 and pool; two heads
        "inception_forward": 9 * 6,
        "aux_pool_forward": 2,
        "aux_pool_backward": 2,
        "max_pool_forward": 2,
        "max_pool_backward": 2,
        "inception_backward": 9 * 9,
        "conv_chain_backward": 4 + 9 + 2 * 5,  # the image needs no gradient
    }
    # Pools 3 and 4: input and output height and width, channels.
    forward, backward = (
        [launch for launch in launches if launch["op"] == op]
        for op in ("max_pool_forward", "max_pool_backward")
    )
    sizes = [(8, 4, 480), (4, 2, 832)]
    for (h, p, c), first, last in zip(sizes, forward, reversed(backward), strict=True):
        x_bytes, y_bytes = (dtype.itemsize * 2 * side * side * c for side in (h, p))
        argmax_bytes = 2 * p * p * c
        assert first["bytes_touched"] == x_bytes + y_bytes + argmax_bytes
        assert last["bytes_touched"] == x_bytes + y_bytes + argmax_bytes
        assert first["bytes_read"] >= x_bytes and first["bytes_written"] == y_bytes + argmax_bytes


@needs_emulator
def test_googlenet_gives_the_same_bits_for_every_seed(make_pair):
    ours, _ = make_pair()
    ours.eval()
    x = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(4))
    results = []
    for seed in range(3):
        with emulated(seed=seed), torch.no_grad():
            results.append(ours(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(emulator_error() is None, reason="built with the emulator")
def test_without_the_emulator_the_error_says_how_to_get_it():
    with pytest.raises(RuntimeError, match="INCEPTION_EXT_EMULATOR=1"), emulated():
        pass
