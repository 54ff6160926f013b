"""What torch is told of the training ops, and torch.compile over them, on emulated CUDA kernels."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager
from fast_path import ARRANGEMENTS, bn_tensors, inception_tensors, output_of, randn, strides
from kernel_devices import exact_products, kernel_ops, needs_emulator
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only
from training_cases import (
    Chain,
    assert_equal,
    each_case,
    gradients,
    leaf_of,
    results_of,
    small_googlenet,
)

from inception_ext import GoogLeNetLoss
from inception_ext.modules import Inception
from inception_ext.testing import emulated

pytestmark = needs_emulator


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


# The ops


CALLS = (
    "max_pool_forward",
    "max_pool_backward",
    "batch_norm_relu_forward",
    "batch_norm_relu_backward",
    "inception_forward",
    "inception_forward, eval",
    "inception_forward, nothing saved",
    "inception_forward, master weights",
    "inception_backward",
    "inception_backward, master weights",
    "inception_backward, no dx",
    "inception_backward, no dw",
    "conv_chain_forward, stem1",
    "conv_chain_forward, stem2",
    "conv_chain_forward, eval",
    "conv_chain_forward, nothing saved",
    "conv_chain_forward, master weights",
    "conv_chain_backward, stem1",
    "conv_chain_backward, stem2",
    "conv_chain_backward, master weights",
    "conv_chain_backward, no dw",
)


def chain_lists(x: Tensor, *filters: tuple[int, int], dtype: torch.dtype) -> list[list[Tensor]]:
    """conv_weights, weights, biases, running_means, running_vars; (K, kernel size) of each."""
    channels, lists = x.shape[1], [[] for _ in range(5)]
    for k, r in filters:
        vectors = bn_tensors(k)
        weight = randn(k, channels, r, r, seed=r).div(channels**0.5 * r).to(dtype)
        for found, tensor in zip(lists, (weight, *vectors.values()), strict=True):
            found.append(tensor.clone())
        channels = k
    return lists


@functools.cache
def op_calls(dtype: torch.dtype = torch.float32, size: tuple[int, int, int] = (2, 6, 5)) -> dict:
    """Arguments of each op, from images of [N, H, W]: those of CALLS."""
    ops = kernel_ops("emulator")
    n, h, w = size
    numbers = (0.1, 1e-3)
    x, channels = randn(n, 17, h, w, dtype=dtype), 17
    vectors = list(bn_tensors(channels).values())
    pool = ([3, 3], [2, 2], [1, 1])
    y, argmax = ops.max_pool_forward(x, *pool, True, True)
    _, mean, rstd = ops.batch_norm_relu_forward(x, *vectors, False, *numbers)

    def module(weights: torch.dtype) -> tuple[list[list[Tensor]], tuple[Tensor, ...]]:
        lists = list(inception_tensors(branch3=5, dtype=weights).values())
        return lists, ops.inception_forward(x, *lists, False, *numbers, True)[1:]

    def chain(x: Tensor, *filters: tuple[int, int], window: Any, weights: torch.dtype) -> Any:
        lists = chain_lists(x, *filters, dtype=weights)
        y, *saved = ops.conv_chain_forward(x, *lists, *window, False, *numbers, True)
        return lists, saved, randn(*y.shape, seed=1, dtype=dtype)

    lists, saved = module(dtype)
    master, master_saved = module(torch.float32)
    grad = randn(n, output_of("odd"), h, w, seed=1, dtype=dtype)
    image = randn(n, 3, 2 * h + 5, 2 * w + 5, dtype=dtype)
    window1, window2 = ([2], [3], [3, 2, 0, 1]), ([1, 1], [0, 1], [2, 2, 0, 1])
    one, one_saved, one_grad = chain(image, (16, 7), window=window1, weights=dtype)
    two, two_saved, two_grad = chain(x, (8, 1), (11, 3), window=window2, weights=dtype)
    both, both_saved, _ = chain(x, (8, 1), (11, 3), window=window2, weights=torch.float32)
    every, no_dx, no_dw = [True] * 7, [False, *[True] * 6], [True, *[False] * 6]
    arguments = (
        (x, *pool, True, True),
        (randn(*y.shape, dtype=dtype), argmax, [h, w], *pool),
        (x, *vectors, True, *numbers),
        (x, x, *vectors[:2], mean, rstd, True),
        (x, *lists, True, *numbers, True),
        (x, *lists, False, *numbers, True),
        (x, *lists, True, *numbers, False),
        (x, *master, True, *numbers, True),
        (grad, x, *lists[:3], *saved, True, every),
        (grad, x, *master[:3], *master_saved, True, every),
        (grad, x, *lists[:3], *saved, True, no_dx),
        (grad, x, *lists[:3], *saved, True, no_dw),
        (image, *one, *window1, True, *numbers, True),
        (x, *two, *window2, True, *numbers, True),
        (x, *two, *window2, False, *numbers, True),
        (x, *two, *window2, True, *numbers, False),
        (x, *both, *window2, True, *numbers, True),
        (one_grad, image, *one[:3], *one_saved, *window1, True, [False, True]),
        (two_grad, x, *two[:3], *two_saved, *window2, True, [True] * 3),
        (two_grad, x, *both[:3], *both_saved, *window2, True, [True] * 3),
        (two_grad, x, *two[:3], *two_saved, *window2, True, [True, False, False]),
    )
    return dict(zip(CALLS, arguments, strict=True))


def op_of(name: str) -> Any:
    return getattr(kernel_ops("emulator"), name.partition(",")[0]).default


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    """Schema, mutation and versions, fake kernels, and dispatch under AOTAutograd, where all that
    the op does not write to needs a gradient."""
    arguments = op_calls(torch.float16 if "master" in name else torch.float32)[name]
    written = [
        a.alias_info is not None and a.alias_info.is_write for a in op_of(name)._schema.arguments
    ]

    def leaf(t: Tensor) -> Tensor:
        return leaf_of(t) if t.is_floating_point() else t

    arguments = [
        value if write else tree_map_only(Tensor, leaf, value)
        for value, write in zip(arguments, written, strict=False)  # defaults are left out
    ]
    torch.library.opcheck(op_of(name), tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "size",
    [(2, 6, 5), (0, 6, 5), (2, 3, 7), (3, 8, 4)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("arrangement", ["nchw", "channels_last", "channel_slice", "transposed"])
def test_fake_results_look_like_the_real_ones(arrangement, size, dtype):
    def arrange(t: Tensor) -> Tensor:
        return ARRANGEMENTS[arrangement](t) if t.dim() == 4 and t.is_floating_point() else t

    for name, arguments in op_calls(dtype, size).items():
        arguments = tree_map_only(Tensor, arrange, arguments)
        real = op_of(name)(*arguments)
        with FakeTensorMode() as mode:
            fake = op_of(name)(*tree_map_only(Tensor, mode.from_tensor, arguments))
        for a, b in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
            assert strides(a) == strides(b), name


# torch.compile


@pytest.fixture
def strict_dynamo() -> Iterator[None]:
    """Compiled once: another frame or a guard that fails is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def train(
    model: nn.Module, run: Callable[[Tensor], Any], images: list[Tensor], amp: bool = False
) -> dict[str, Tensor]:
    """A few SGD steps by ``run``; the losses and the state that they lead to."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = {}
    for i, x in enumerate(images):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=amp):
            loss = run(x)
        loss.backward()
        optimizer.step()
        losses[f"loss {i}"] = loss.detach()
    return losses | gradients(model) | {k: v.clone() for k, v in model.state_dict().items()}


@each_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_blocks(case, training, strict_dynamo):
    """One op forward, one backward, equal bits, and one compilation for all steps."""
    block = case.module().train(training)
    eager = copy.deepcopy(block)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for seed in (0, 1, 2):  # with what the steps before have left in the buffers
        x = randn(3, 16, 7, 6, seed=seed)
        with emulated() as launches:
            ours = results_of(compiled, x)
        with emulated(counting=False):
            expected = results_of(eager, x)
        assert {launch["op"] for launch in launches} == {
            f"{case.op}_forward",
            f"{case.op}_backward",
        }
        assert_equal({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, expected)
    assert counter.frame_count == 1


@each_case
def test_blocks_under_autocast(case, strict_dynamo):
    block = case.module()
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    images = [randn(3, 16, 7, 6, seed=seed).half() for seed in (0, 1)]
    with emulated(checks=False, counting=False):
        ours = train(block, lambda x: compiled(x).float().square().mean(), images, amp=True)
        expected = train(eager, lambda x: eager(x).float().square().mean(), images, amp=True)
    assert_equal(ours, expected)


def test_any_batch(strict_dynamo):
    """With dynamic shapes one compilation serves all sizes, also for the backward."""
    block = Inception(16, 8, 8, 16, 4, 8, 8)
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, h, w in ((2, 7, 6), (3, 9, 8), (5, 4, 11)):
        x = randn(n, 16, h, w, seed=n)
        with emulated(checks=False, counting=False):
            ours, expected = results_of(compiled, x), results_of(eager, x)
        assert_equal({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, expected)


def test_the_network_with_both_heads(strict_dynamo):
    """In mixed precision: the same launches, and steps that lead to the same weights."""
    torch.manual_seed(0)
    model = small_googlenet()
    eager = copy.deepcopy(model)
    criterion, labels = GoogLeNetLoss(), torch.arange(4)
    images = [randn(4, 3, 32, 32, seed=seed) for seed in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: criterion(model(x), labels), backend=counter, fullgraph=True)
    with emulated(checks=False) as launches:
        ours = train(model, compiled, images, amp=True)
    with emulated(checks=False) as eager_launches:
        expected = train(eager, lambda x: criterion(eager(x), labels), images, amp=True)
    assert counter.frame_count == 1
    assert [n["op"] for n in launches] == [n["op"] for n in eager_launches]
    assert_equal(ours, expected)


def test_inductor(strict_dynamo):
    """Which checks at run time the strides that the fake kernels promised, and fuses the rest."""
    torch.manual_seed(0)
    model = nn.Sequential(Chain(), Inception(24, 8, 8, 16, 4, 8, 8))
    model.to(memory_format=torch.channels_last)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    images = [randn(3, 16, 9, 8, seed=seed) for seed in range(2)]
    compiled = torch.compile(lambda x: model(x).square().mean(), fullgraph=True)
    with emulated(checks=False, counting=False):
        ours = train(model, compiled, images)
        expected = train(eager, lambda x: eager(x).square().mean(), images)
    doubles = [x.double() for x in images]
    reference = train(exact, lambda x: exact(x).square().mean(), doubles)
    assert_all_as_good_as_eager(ours, expected, reference, BLOCK_NOISE_FLOOR)
