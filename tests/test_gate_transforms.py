"""The gate under what traces a module, and under derivatives of other kinds."""

import copy
from collections.abc import Callable

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager, assert_as_good_as_eager
from fast_path import CalledOps, randn
from gate_cases import (
    FUSED,
    X,
    assert_plain,
    each_mode,
    make_block,
    without_kernels,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from inception_ext import functional

# Tracing


def test_fx(block):
    block.eval()
    traced = torch.fx.symbolic_trace(block)
    targets = {getattr(node.target, "__name__", node.target) for node in traced.graph.nodes}
    assert {"branch1.conv", "branch2.1.bn", "relu", "cat"} <= targets
    with CalledOps() as called:
        torch.testing.assert_close(traced(X), block(X))
    assert called.names == ["inception_forward"]  # the block's, not the graph's


@each_mode
def test_jit_script(block, training):
    block.train(training)
    scripted = torch.jit.script(copy.deepcopy(block))
    with CalledOps() as called:
        y = scripted(X)
    assert called.names == []
    torch.testing.assert_close(y, block(X))


def test_jit_trace(block):
    block.eval()
    traced = torch.jit.trace(block, X)
    assert "inception_ext::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), block(X))


def test_export(block):
    program = torch.export.export(block.eval(), (X,))
    assert "inception_ext." not in str(program.graph)
    torch.testing.assert_close(program.module()(X), block(X))


# Derivatives of other kinds


def test_functional_call_is_fused(block):
    """Without a transform, other parameters are nothing special."""
    parameters = {k: (p * 1.5).detach().requires_grad_() for k, p in block.named_parameters()}
    with CalledOps() as called:
        y = functional_call(block, parameters, (X,))
        y.sum().backward()
    assert called.names == FUSED
    assert all(p.grad is not None for p in parameters.values())
    expected = without_kernels(lambda: functional_call(make_block(), parameters, (X,)))
    torch.testing.assert_close(y, expected)


def test_vmap(block):
    block.eval()
    assert_plain(lambda: vmap(block)(X.expand(2, *X.shape)))
    assert_plain(lambda: vmap(lambda x: functional.max_pool(x, 3, 2))(X[None]))


def test_vmap_over_parameters(block):
    block.eval()
    parameters = {k: torch.stack([p, 2 * p]).detach() for k, p in block.named_parameters()}
    assert_plain(lambda: vmap(lambda p: functional_call(block, p, (X,)))(parameters))


def test_grad_and_per_sample_gradients(block):
    block.eval()
    parameters = {k: p.detach() for k, p in block.named_parameters()}

    def loss(parameters, x):
        return functional_call(block, parameters, (x[None],)).square().sum()

    assert_plain(lambda: grad(loss)(parameters, X[0]))
    assert_plain(lambda: vmap(grad(loss), (None, 0))(parameters, X))
    assert_plain(lambda: torch.func.hessian(lambda x: block(x).sum())(X[:1, :, :2, :2]))


def test_jvp(block):
    block.eval()
    assert_plain(lambda: jvp(block, (X,), (torch.ones_like(X),)))


@pytest.mark.parametrize("dual", ["input", "weight"])
def test_forward_mode(block, dual):
    block.eval()

    def tangent():
        with forward_ad.dual_level():
            x, weight = X, block.branch1.conv.weight.detach()
            if dual == "input":
                x = forward_ad.make_dual(x, torch.ones_like(x))
            else:
                weight = forward_ad.make_dual(weight, torch.ones_like(weight))
            y = functional_call(block, {"branch1.conv.weight": weight}, (x,))
            return forward_ad.unpack_dual(y).tangent

    assert_plain(tangent)
    assert tangent().abs().max() > 0


@each_mode
def test_create_graph(block, training):
    def penalty(dtype=torch.float32):
        module = make_block().train(training).to(dtype)
        x = X.to(dtype, copy=True).requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return {"dx": x.grad, **{k: p.grad for k, p in module.named_parameters()}}

    with CalledOps() as called:
        ours = penalty()
    assert called.names == FUSED  # the backward of the penalty alone, which nobody differentiates
    exact = penalty(torch.float64)
    assert_all_as_good_as_eager(ours, without_kernels(penalty), exact, BLOCK_NOISE_FLOOR)


def test_a_network_that_makes_its_own_weights():
    """Weights computed from the input, under create_graph."""

    def gradient(dtype=torch.float32):
        module = make_block().eval().to(dtype)
        x = X.to(dtype, copy=True).requires_grad_()
        scale = x.mean()
        parameters = {k: p.detach() * (1 + scale) for k, p in module.named_parameters()}
        y = functional_call(module, parameters, (x,))
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].detach()

    with CalledOps() as called:
        ours = gradient()
    assert called.names == ["inception_forward"]
    exact = gradient(torch.float64)
    assert_as_good_as_eager(ours, without_kernels(gradient), exact, BLOCK_NOISE_FLOOR)


BATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "inception, train": lambda x: make_block().to(x.dtype)(x),
    "inception, eval": lambda x: make_block().to(x.dtype).eval()(x),
    "batch_norm_relu, train": lambda x: make_block().to(x.dtype).branch1(x),
    "batch_norm_relu, eval": lambda x: make_block().to(x.dtype).eval().branch1(x),
    "max_pool": lambda x: functional.max_pool(x, 3, 2, 1, True),
}


@pytest.mark.filterwarnings("error:There is a performance drop")  # of ops without batching rules
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap", "jacobian"])
@pytest.mark.parametrize("name", BATCHED)
def test_batched_gradients(name, how):
    """Several backward passes over one forward pass at once."""
    function = BATCHED[name]

    def gradients(dtype: torch.dtype = torch.float32) -> Tensor:
        x = X.to(dtype, copy=True).requires_grad_()
        if how == "jacobian":
            return torch.autograd.functional.jacobian(
                lambda x: function(x).sum((0, 2, 3)), x, vectorize=True
            )
        y = function(x)
        many = randn(3, *y.shape, seed=4, dtype=dtype)
        if how == "vmap":
            return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(many)
        return torch.autograd.grad(y, x, many, is_grads_batched=True)[0]

    with CalledOps() as called:
        ours = gradients()
    assert called.names == [f"{name.partition(',')[0]}_forward"]
    assert not ours.requires_grad
    exact = gradients(torch.float64)
    assert_as_good_as_eager(ours, without_kernels(gradients), exact, BLOCK_NOISE_FLOOR)
