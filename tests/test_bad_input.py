"""Bad arguments raise, and the text says which op, which argument, what was expected and what came.

The raw ops, which do not rely on any check in Python, are called with every argument wrong in every
way; the modules raise what the plain path raises.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fast_path import CALLS, inception_tensors, op_calls, op_of, randn
from torch import Tensor, nn

import inception_ext
from inception_ext import functional, reference
from inception_ext.modules import BasicConv2d, Inception

ops = torch.ops.inception_ext

Case = tuple[str, int, Any, str]  # call, index of the argument, bad value, what the message says


def bad_tensors(name: str, tensor: Tensor) -> Iterator[tuple[Any, str]]:
    """Tensors that cannot stand in for one, each with what the message says."""
    got = re.escape(str(list(tensor.shape)))
    yield tensor.double(), f"{name}: expected .*, got float64"
    yield tensor.to(torch.int64), f"{name}: expected .*, got int64"
    yield tensor.bool(), f"{name}: expected .*, got bool"
    yield tensor.to(torch.complex64), f"{name}: expected .*, got another dtype"
    if tensor.dim() == 4:
        yield tensor[0], rf"{name}: expected (4D input|shape \[.*\]), got (3D of shape )?\["
        yield tensor[..., None], rf"{name}: expected (4D input|shape \[.*\]), got (5D of shape )?\["
        yield (
            tensor.flatten()[0],
            rf"{name}: expected (4D input|shape \[.*\]), got (0D of shape )?\[",
        )
    else:
        yield tensor[None], rf"{name}: expected shape {got}, got \[1, "
        yield tensor[:-1], rf"{name}: expected shape {got}, got \["
        yield tensor[:0], rf"{name}: expected shape {got}, got \[0\]"
        yield tensor[0], rf"{name}: expected shape {got}, got \[\]"


# Activations whose size the other arguments settle.
SETTLED = {
    "argmax", "raw_1x1", "raw_3x3", "raw_5x5", "raw_pool", "reduced_3x3", "reduced_5x5", "pooled"
}  # fmt: skip


def bad_sizes(op: str, name: str, tensor: Tensor) -> Iterator[tuple[Any, str]]:
    if tensor.dim() != 4 or not (name in SETTLED or (name == "grad" and "max_pool" not in op)):
        return
    message = rf"{name}: expected shape {re.escape(str(list(tensor.shape)))}, got \["
    yield tensor[:-1], message
    yield tensor[:, :-1] if tensor.shape[1] > 1 else tensor.expand(-1, 2, -1, -1), message
    yield tensor[:, :, 1:], message
    yield tensor[..., 1:], message
    yield tensor[:0], message


HUGE = (2**31, 2**62, 2**62 + 1, -1, -(2**62))


def bad_pairs(name: str, pair: list[int]) -> Iterator[tuple[Any, str]]:
    """Two integers, of a window or a size."""
    for length in (0, 1, 3):
        yield (pair * 2)[:length], f"{name}: expected 2 values, got {length}"
    for bad in (*HUGE, 0, 256, 2**16):
        if (name, bad) in (("stride", 256), ("stride", 2**16), ("padding", 0)):
            continue  # is none
        for values in ([bad, pair[1]], [pair[0], bad], [bad, bad]):
            if name == "input_size" and bad > 0:  # no such memory, or no such number of elements
                yield [2**62, bad], "(?i)overflow|memory|negative|storage"
            elif name == "input_size":
                yield values, f"{name}: expected more than .*, got {bad}"
            else:
                yield values, f"{name}: expected .* to .*, got {bad}"
    for bad in (2**63, -(2**63) - 1, 2**100):
        yield [bad, bad], f"(?s)Expected a value of type 'List\\[int\\]' for argument '{name}'"


def bad_values(op: str, name: str, value: Any) -> Iterator[tuple[Any, str]]:
    if isinstance(value, Tensor):
        yield from bad_tensors(name, value)
        yield from bad_sizes(op, name, value)
    elif isinstance(value, list) and isinstance(value[0], Tensor):
        for length in (0, 5, 7):
            yield (value * 2)[:length], f"{name}: expected 6 tensors, got {length}"
        for i in range(6):
            for bad, message in bad_tensors(rf"{name}\[{i}\]", value[i]):
                yield [*value[:i], bad, *value[i + 1 :]], message
    elif isinstance(value, list) and isinstance(value[0], bool):
        count = len(value)
        yield value[1:], f"{name}: expected {count} values, got {count - 1}"
        yield [], f"{name}: expected {count} values, got 0"
    elif isinstance(value, list) and isinstance(value[0], int):
        yield from bad_pairs(name, value)
    elif isinstance(value, list):
        yield value[1:], "scale and shift: expected 17 values each, got (16 and 17|17 and 16)"
        yield [], "scale and shift: expected 17 values each, got (0 and 17|17 and 0)"
    elif name == "group_size":
        for bad in (*HUGE, 0, 2):
            yield bad, f"{name}: expected 1 on the CPU, got {bad}"
    elif isinstance(value, int) and not isinstance(value, bool):
        for bad in (*HUGE, 4):
            yield bad, f"{name}: expected 0 to 3, got {bad}"
        yield 2**63, f"Expected a value of type 'int' for argument '{name}'"


ONCE = [name for name in CALLS if name.partition(",")[2] in ("", " eval")]


@pytest.mark.parametrize("call", ONCE)
def test_every_argument_of_every_op(call):
    op = op_of(call)
    count = 0
    for i, argument in enumerate(op._schema.arguments):
        for bad, message in bad_values(op.name(), argument.name, op_calls()[call][i]):
            arguments = list(op_calls()[call])
            arguments[i] = bad
            with pytest.raises(RuntimeError) as caught:
                op(*arguments)
            text = str(caught.value)
            assert re.search(message, text), (argument.name, message, text)
            if "for argument" not in message and "(?i)" not in message:
                assert f"inception_ext::{op._schema.name.partition('::')[2]}: " in text
            count += 1
    assert count > 5


@pytest.mark.parametrize("call", ONCE)
def test_other_layouts(call):
    """Sparse tensors have no kernel, and torch says so."""
    op = op_of(call)
    for i, value in enumerate(op_calls()[call]):
        if isinstance(value, Tensor):
            arguments = list(op_calls()[call])
            arguments[i] = value.to_sparse()
            with pytest.raises(NotImplementedError, match=f"{op.name()}.*SparseCPU"):
                op(*arguments)


def test_max_pool_backward_needs_windows_that_reach_the_input():
    grad, argmax = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    window = ([3, 3], [2, 2], [0, 0])
    assert ops.max_pool_backward(grad, argmax, [7, 7], *window).shape == (1, 2, 7, 7)
    for size in ([6, 7], [7, 6], [0, 7], [7, -5]):
        with pytest.raises(RuntimeError, match="input_size: expected more than 6 for a gradient"):
            ops.max_pool_backward(grad, argmax, size, *window)


def test_max_pool_backward_reads_any_index():
    """An index beyond the window is nobody's maximum; nothing is read or written elsewhere."""
    grad = torch.ones(1, 40, 4, 4)
    argmax = torch.full((1, 40, 4, 4), 255, dtype=torch.uint8)
    dx = ops.max_pool_backward(grad, argmax, [9, 9], [3, 3], [2, 2], [0, 0])
    assert torch.equal(dx, torch.zeros(1, 40, 9, 9))


def test_window_area():
    x = torch.zeros(1, 1, 300, 300)
    for kernel in ([16, 16], [255, 2], [2, 255]):
        with pytest.raises(RuntimeError, match="kernel_size: expected an area of at most 255, got"):
            ops.max_pool_forward(x, kernel, [1, 1], [0, 0], False, False)
    assert ops.max_pool_forward(x, [255, 1], [1, 1], [0, 0], False, True)[0].shape[2] == 46


@pytest.mark.parametrize("stride", [1, 7, 2**31 - 1])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_largest_stride(stride, ceil_mode):
    x = randn(1, 3, 9, 9)
    y, _ = ops.max_pool_forward(x, [3, 3], [stride] * 2, [1, 1], ceil_mode, True)
    expected = torch.nn.functional.max_pool2d(x, 3, stride, 1, ceil_mode=ceil_mode)
    assert torch.equal(y, expected)


def test_output_that_is_too_small():
    text = "max_pool_forward: x: Output size is too small"
    for size, axis in (
        *(((1, 3, 2, 9), "height 2"), ((1, 3, 9, 2), "width 2"), ((1, 3, 1, 1), "height 1")),
        *(((1, 3, 0, 9), "height 0"), ((1, 3, 9, 0), "width 0"), ((0, 3, 0, 0), "height 0")),
    ):
        with pytest.raises(RuntimeError, match=f"{text}: {axis} gives"):
            ops.max_pool_forward(torch.zeros(size), [3, 3], [2, 2], [0, 0], False, False)


def test_image_dtype():
    for dtype, name in ((torch.float64, "float64"), (torch.uint8, "uint8")):
        with pytest.raises(RuntimeError, match=f"dtype: expected float32 or bfloat16, got {name}"):
            ops.image_to_nhwc(torch.zeros(1, 3, 4, 4), [1.0] * 3, [0.0] * 3, dtype)


def test_copies_go_to_pixels():
    x, y = torch.zeros(2, 3, 4, 5), torch.zeros(2, 8, 4, 5)
    for wrong in (y, y[:1].expand(2, -1, -1, -1), y[:, :1].expand(-1, 8, -1, -1)):
        with pytest.raises(RuntimeError, match="copy_channels: y: expected a channels_last tensor"):
            ops.copy_channels(wrong, x, 0)
    overlapping = torch.zeros(100).as_strided((2, 3, 4, 5), (40, 1, 10, 2))
    with pytest.raises(RuntimeError, match="copy_channels: y: expected a channels_last tensor"):
        ops.copy_channels(overlapping, x, 0)
    nhwc = y.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="offset: expected 0 to -1, got 0"):
        ops.copy_channels(nhwc[:, :2], x, 0)
    with pytest.raises(RuntimeError, match="x: expected float32, got bfloat16"):
        ops.copy_channels(nhwc, x.bfloat16(), 0)


def test_statistics_that_share_memory():
    """What cannot be written to is refused; what is only read may be expanded."""
    x, weight, bias, mean, var, *_ = op_calls()["batch_norm_relu_forward, train"]
    arguments = (x, weight, bias, mean[:1].expand(17), var)
    message = "running_mean: expected 17 elements to write to, got one that is expanded"
    with pytest.raises(RuntimeError, match=message):
        ops.batch_norm_relu_forward(*arguments, True, 0.1, 1e-3)
    y = ops.batch_norm_relu_forward(*arguments, False, 0.1, 1e-3)[0]
    arguments = (x, weight, bias, mean[:1].repeat(17), var)
    assert torch.equal(y, ops.batch_norm_relu_forward(*arguments, False, 0.1, 1e-3)[0])

    grad, x, weight, bias, *_ = op_calls()["batch_norm_relu_backward"]
    one = torch.ones(1)
    expanded = ops.batch_norm_relu_backward(
        grad, x, weight, bias, one.expand(17), one.expand(17), True
    )
    dense = ops.batch_norm_relu_backward(
        grad, x, weight, bias, torch.ones(17), torch.ones(17), True
    )
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_no_memory():
    """What torch says about it comes through (from 2.13 on; before, it is on stderr)."""
    huge = torch.zeros(1, 1, 1, 1).expand(1, 64, 2**27, 2**27)  # 2**62 bytes, were it copied
    with pytest.raises(RuntimeError, match=r"allocate memory.* \d{19} bytes|see stderr for why"):
        ops.max_pool_forward(huge, [3, 3], [2, 2], [0, 0], False, False)


def test_no_channels():
    x = torch.zeros(2, 0, 4, 4)
    y, argmax = ops.max_pool_forward(x, [3, 3], [1, 1], [1, 1], False, True)
    assert y.shape == argmax.shape == x.shape
    nothing = torch.zeros(0)
    for training in (True, False):
        arguments = (x, nothing, nothing, nothing.clone(), nothing.clone(), training, 0.1, 1e-3)
        assert ops.batch_norm_relu_forward(*arguments)[0].shape == x.shape


def test_a_convolution_of_nothing():
    call = "inception_forward, eval"
    x, conv_weights, *rest = op_calls()[call]
    for size in ((2, 0, 4, 4), (2, 17, 0, 4), (2, 17, 4, 0)):
        text = "x: expected at least one channel, row and column, got"
        with pytest.raises(RuntimeError, match=f"{text} {re.escape(str(list(size)))}"):
            op_of(call)(torch.zeros(size), conv_weights, *rest)
    conv_weights[0] = conv_weights[0][:0]
    text = r"conv_weights\[0\]: expected at least one output channel, got 0"
    with pytest.raises(RuntimeError, match=text):
        op_of(call)(x, conv_weights, *rest)


# functional


@pytest.mark.parametrize("length", [0, 5, 7])
def test_lists_of_another_length(length):
    x = randn(2, 17, 4, 4)
    for name in inception_tensors():
        tensors = inception_tensors()
        tensors[name] = (tensors[name] * 2)[:length]
        with pytest.raises(
            ValueError, match=f"^inception: {name}: expected 6 tensors, got {length}$"
        ):
            functional.inception(x, *tensors.values(), True, 0.1, 1e-3)


def outcome(function: Callable[[], object]) -> tuple[type | None, str]:
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def assert_same_error(call: Callable[[Any], object]) -> None:
    """``call(functional)`` and ``call(reference)`` raise the same."""
    ours, plain = outcome(lambda: call(functional)), outcome(lambda: call(reference))
    assert ours == plain and ours[0] is not None, (ours, plain)


@pytest.mark.parametrize(
    "window",
    [
        *((bad, 1, 0) for bad in (0, -1, 2**31, 2**62, [3, -1], [3, 3, 3])),
        *((3, bad, 0) for bad in (0, -1, 2**31, 2**62, [1, 0], [1, 1, 1])),
        *((3, 1, bad) for bad in (2, -1, 2**31, 2**62, [0, -1], [0, 0, 0])),
        *(
            (3.0, 1, 0),
            ("3", 1, 0),
            (None, 1, 0),
            (2**63, 1, 0),
            ([], 1, 0),
            (3, 1, None),
        ),
    ],
    ids=str,
)
def test_windows_raise_what_torch_raises(window):
    x = randn(2, 3, 9, 9)
    kind, text = outcome(lambda: functional.max_pool(x, *window))
    plain_kind, plain_text = outcome(lambda: reference.max_pool(x, *window))
    if text.startswith("inception_ext::max_pool_forward: "):
        assert kind is plain_kind is RuntimeError
        assert re.search(r"(kernel_size|stride|padding): expected .*, got ", text)
    else:
        line = plain_text.partition("\n")[0][:80]  # a stack trace may follow
        assert kind is plain_kind is not None and text.startswith(line)


@pytest.mark.parametrize(
    "window", [([3], 2, 0), (3, [2], [1]), ((3, 2), (2, 1), (0, 1)), (3, [], 0), (3, None)], ids=str
)
def test_windows_in_every_form(window):
    x = randn(2, 3, 9, 9)
    assert torch.equal(functional.max_pool(x, *window), reference.max_pool(x, *window))


BN = [torch.ones(3) for _ in range(4)]


@pytest.mark.parametrize(
    ("x", "vectors"),
    [
        (randn(3), BN),
        (randn(2, 4, 5, 5), BN),
        (randn(2, 3, 5, 5).to(torch.int64), BN),
        (randn(2, 3, 5, 5).to("meta"), BN),
        (randn(2, 3, 5, 5), [torch.ones(3).bfloat16()] * 4),
        (randn(2, 3, 5, 5), [torch.ones(3).double(), *BN[1:]]),
        (randn(2, 3, 5, 5), [torch.ones(4), *BN[1:]]),
        (randn(2, 3, 5, 5), [*BN[:2], torch.ones(2), BN[3]]),
        (randn(2, 3, 5, 5), [*BN[:3], torch.ones(3, 1)]),
        (randn(2, 3, 5, 5), [*BN[:3], torch.ones(3, device="meta")]),
        (randn(2, 3, 5, 5).bfloat16(), [torch.ones(3).bfloat16(), *BN[1:]]),
        (randn(1, 3, 1, 1), BN),
    ],
    ids=str,
)
def test_batch_norm_relu_raises_what_torch_raises(x, vectors):
    assert_same_error(
        lambda library: library.batch_norm_relu(x, *(v.clone() for v in vectors), True, 0.1, 1e-3)
    )


@pytest.mark.parametrize("name", inception_tensors())
@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t.double(),
        lambda t: t.to(torch.int64),
        lambda t: t[0],
        lambda t: t[..., None],
        lambda t: t.repeat_interleave(2, 0),
        lambda t: t.repeat_interleave(2, -1) if t.dim() == 1 else t.repeat_interleave(2, 1),
        lambda t: t[:0],
        lambda t: t.to("meta"),
    ],
    ids=["float64", "int64", "fewer dims", "more dims", "longer", "wider", "empty", "meta"],
)
def test_inception_raises_what_torch_raises(name, spoil):
    tensors = inception_tensors()
    tensors[name][2] = spoil(tensors[name][2])
    x = randn(2, 17, 4, 4)
    ours, plain = (
        outcome(lambda lib=library: lib.inception(x, *tensors.values(), True, 0.1, 1e-3))
        for library in (functional, reference)
    )
    assert ours == plain


# Modules

BAD_INPUTS = {
    "3-D": randn(16, 7, 7),
    "2-D": randn(16, 7),
    "5-D": randn(2, 16, 7, 7, 1),
    "channels": randn(2, 15, 7, 7),
    "float64": randn(2, 16, 7, 7).double(),
    "float16": randn(2, 16, 7, 7).half(),
    "bfloat16": randn(2, 16, 7, 7).bfloat16(),
    "int64": randn(2, 16, 7, 7).to(torch.int64),
    "uint8": randn(2, 16, 7, 7).to(torch.uint8),
    "meta": randn(2, 16, 7, 7).to("meta"),
    "sparse": randn(2, 16, 7, 7).to_sparse(),
    "empty": torch.zeros(2, 16, 0, 7),
    "no tensor": [1.0],
    "None": None,
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("kind", ["Inception", "BasicConv2d"])
def test_modules_raise_what_the_plain_path_raises(kind, bad, training):
    torch.manual_seed(0)
    module: nn.Module = (
        Inception(16, 8, 8, 8, 8, 8, 8)
        if kind == "Inception"
        else BasicConv2d(16, 8, kernel_size=3, padding=1)
    )
    module.train(training)
    x = BAD_INPUTS[bad]
    ours = outcome(lambda: module(x))
    with functional.use_kernels(False):
        plain = outcome(lambda: copy.deepcopy(module)(x))
    assert ours == plain


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape", [(3, 32, 32), (2, 4, 32, 32), (2, 3, 14, 14), (1, 3, 32, 32), (2, 3, 32), (2, 3, 0, 0)]
)
def test_networks_raise_what_the_plain_path_raises(training, shape):
    model = inception_ext.GoogLeNet(10, init_weights=False).train(training)
    ours = outcome(lambda: model(torch.zeros(shape)))
    with functional.use_kernels(False):
        plain = outcome(lambda: model(torch.zeros(shape)))
    assert ours == plain
    assert ours[0] is not None or (shape == (1, 3, 32, 32) and not training)


def test_one_value_per_channel(tv_googlenet):
    text = "Expected more than 1 value per channel when training"
    for library in (inception_ext, tv_googlenet):
        block = library.Inception(16, 8, 8, 8, 8, 8, 8)
        with pytest.raises(ValueError, match=text):
            block(randn(1, 16, 1, 1))
        block(randn(2, 16, 1, 1))
        block.eval()(randn(1, 16, 1, 1))
