"""Training on the compiled ops: statistics, gradients, autocast, memory."""

import copy
import gc
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager, assert_as_good_as_eager
from fast_path import CalledOps, randn, strides
from gate_cases import (
    FUSED,
    X,
    check,
    each_mode,
    make_block,
    resident_bytes,
    results_of,
    saved_storages,
    without_kernels,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import inception_ext
from inception_ext import functional
from inception_ext.modules import BasicConv2d, Inception

# Bookkeeping of training


def bookkeeping(block: nn.Module) -> dict[str, Tensor]:
    return {k: b.clone() for k, b in block.named_buffers()}


def test_buffers_are_those_of_torchvision(tv_googlenet):
    ours = make_block()
    theirs = tv_googlenet.Inception(16, 8, 8, 12, 4, 8, 8)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        for block in (ours, theirs):
            block(randn(3, 16, 7, 6, seed=step))
        torch.testing.assert_close(bookkeeping(ours), bookkeeping(theirs))
    assert ours.branch2[1].bn.num_batches_tracked == 3
    ours.eval()(X)
    assert ours.branch2[1].bn.num_batches_tracked == 3


@pytest.mark.parametrize("requires_grad", [True, False])
def test_versions_tell_what_was_written(requires_grad):
    """Whoever watches ``_version`` (a frozen engine, autograd) sees running statistics change."""
    for module in (make_block(), BasicConv2d(16, 8, kernel_size=1)):
        module.requires_grad_(requires_grad)
        before = {k: b._version for k, b in module.named_buffers()}
        module(X)
        assert all(b._version > before[k] for k, b in module.named_buffers())
        before = {k: b._version for k, b in module.named_buffers()}
        module.eval()(X)
        assert all(b._version == before[k] for k, b in module.named_buffers())
        before = {k: p._version for k, p in module.named_parameters()}
        module.train()(X)
        assert all(p._version == before[k] for k, p in module.named_parameters())


def test_a_failed_call_leaves_running_statistics_alone(block):
    before = bookkeeping(block)
    with pytest.raises(RuntimeError):
        block(randn(2, 15, 7, 6))
    after = bookkeeping(block)
    assert all(torch.equal(after[k], before[k]) for k in before if "running" in k)


def test_statistics_of_bfloat16_modules(block):
    block.bfloat16()
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    block(X.bfloat16())
    without_kernels(lambda: plain(X.bfloat16()))
    exact(X.bfloat16().double())
    assert_all_as_good_as_eager(*(bookkeeping(module) for module in (block, plain, exact)))


# Training


def test_parameters_without_gradients(block):
    frozen = [name for name, _ in block.named_parameters()][::2]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    check(block, kernels=True)
    block(X).sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name in frozen)


def convolution_backwards(block: nn.Module, x: Tensor) -> list[list[bool]]:
    """Of each convolution's backward: whether the gradients of (input, weight) were computed."""
    y = block(x)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    events = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    return [event.concrete_inputs[-1][:2] for event in events]


def test_no_gradient_is_computed_that_nobody_wants(block):
    leaf = X.clone().requires_grad_()
    assert convolution_backwards(block, leaf) == [[True, True]] * 4  # the three 1x1 as one
    first_stage, branch2_1, branch3_1, pool = (
        [False, True],
        [True, True],
        [True, True],
        [False, True],
    )
    assert sorted(convolution_backwards(block, X)) == sorted(
        [first_stage, branch2_1, branch3_1, pool]
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    assert convolution_backwards(block, leaf) == [[True, False]] * 4


def test_an_input_without_gradient(block):
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    with CalledOps() as called:
        block(X).square().sum().backward()
    assert called.names == FUSED
    without_kernels(lambda: plain(X).square().sum().backward())
    exact(X.double()).square().sum().backward()
    gradients = [{k: p.grad for k, p in m.named_parameters()} for m in (block, plain, exact)]
    assert_all_as_good_as_eager(*gradients, BLOCK_NOISE_FLOOR)


def test_frozen_batch_norms_in_training(block):
    block.train()
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval()
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    before = bookkeeping(block)
    with CalledOps() as called:
        ours = results_of(block, X)
    assert called.names == FUSED
    assert_all_as_good_as_eager(
        ours,
        without_kernels(lambda: results_of(plain, X)),
        results_of(exact, X.double()),
        BLOCK_NOISE_FLOOR,
    )
    assert all(torch.equal(ours[name], value) for name, value in before.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
@each_mode
def test_checkpointing(block, training, use_reentrant):
    block.train(training)
    whole = copy.deepcopy(block)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(block, x, use_reentrant=use_reentrant)

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with CalledOps() as called:
        Checkpointed()(x).square().sum().backward()
    assert called.names == ["inception_forward", *FUSED]
    whole(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for a, b in zip(block.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@each_mode
def test_two_backward_passes_and_accumulation(block, training):
    block.train(training)
    y = block(X)
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in block.parameters()]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    for parameter, grad_once in zip(block.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad_once)

    block.zero_grad()
    for _ in range(3):
        block(X).sum().backward()
    for parameter, grad_once in zip(block.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * grad_once)


def test_an_input_changed_in_place_is_noticed(block):
    x = X.clone()
    y = block(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = block(X)
    with torch.no_grad():
        block.branch2[1].conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_in_place(block):
    expected = block(X) * 2
    (expected.sum()).backward()
    first = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(X).mul_(2).sum().backward()
    for parameter, gradient in zip(block.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_gradients_own_their_memory(block):
    """In the layout of their parameters, none a part of another."""
    for module in (block, make_block().to(memory_format=torch.channels_last)):
        module(X).sum().backward()
        for parameter in module.parameters():
            assert strides(parameter.grad) == strides(parameter)
        storages = {p.grad.untyped_storage().data_ptr() for p in module.parameters()}
        assert len(storages) == len(list(module.parameters()))


# Autocast


@each_mode
def test_autocast(block, training):
    block.train(training)
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with CalledOps() as called:
            ours = block(x)
            ours.sum().backward()
        expected = without_kernels(lambda: plain(x))
    expected.sum().backward()
    assert called.names == FUSED
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert_as_good_as_eager(ours, expected, exact(x.double()))
    for a, b in zip(block.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "x"),
    [(torch.bfloat16, X), (torch.float16, X), (torch.float16, X.bfloat16())],
    ids=str,
)
def test_autocast_that_would_cast_the_input(block, dtype, x):
    """Pooling before the cast and after it differ in where gradients of near ties go."""
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    with torch.autocast("cpu", dtype), CalledOps() as called:
        y = block(x)
        expected = without_kernels(lambda: plain(x))
    assert "inception_forward" not in called.names
    assert y.dtype == expected.dtype == dtype
    assert_as_good_as_eager(y, expected, exact(x.double()))


@each_mode
def test_autocast_of_the_network(training):
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(10, init_weights=False).train(training)
    with torch.autocast("cpu", torch.bfloat16), CalledOps() as called:
        outputs = model(torch.randn(2, 3, 64, 64))
        logits = outputs.logits if training else outputs
    assert called.names.count("inception_forward") == 9
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_ops_keep_their_dtype_under_autocast(block):
    block.eval()
    expected = block(X)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = functional.max_pool(X, 3, 2)
        normed = functional.batch_norm_relu(
            X, torch.ones(16), torch.ones(16), torch.zeros(16), torch.ones(16), False, 0.1, 1e-3
        )
        with torch.autocast("cpu", enabled=False), CalledOps() as called:
            assert torch.equal(block(X), expected)
    assert called.names == ["inception_forward"]
    assert pooled.dtype == normed.dtype == torch.float32
    assert torch.equal(pooled, F.max_pool2d(X, 3, 2))


# Memory


@each_mode
@pytest.mark.parametrize("how", ["backward", "dropped"])
def test_saved_tensors_are_freed(block, training, how):
    block.train(training)
    gc.disable()  # by counting references alone
    try:
        y, saved = saved_storages(lambda: block(X.clone().requires_grad_()))
        mine = {StorageWeakRef(p.untyped_storage()) for p in block.parameters()}
        assert len(saved) == 19 + 10
        if how == "backward":
            y.sum().backward()
            output = y.detach()
        else:
            output = torch.empty(0)
        del y
        alive = [s for s in saved if not s.expired() and s not in mine]
        assert alive == [] and output is not None
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it here")
def test_training_does_not_grow():
    torch.manual_seed(0)
    block = Inception(64, 32, 32, 48, 16, 32, 32)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = randn(4, 64, 28, 28).requires_grad_()

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
        return resident_bytes()

    before = steps(10)
    assert steps(50) - before < 8 * 2**20  # one step alone saves more than 4 MB
