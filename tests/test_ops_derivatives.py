"""Derivatives of first and second order of the compiled ops."""

from typing import Any

import pytest
import torch
from closeness import (
    assert_all_as_good_as_eager,
)
from fast_path import (
    CalledOps,
    bn_tensors,
    inception_tensors,
    randn,
)
from ops_cases import as_leaf, each_branch3, each_mode
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_map_only

from inception_ext import functional, reference


def bn_call(library: Any, training: bool, dtype: torch.dtype = torch.float64):
    tensors = {name: tensor.to(dtype) for name, tensor in bn_tensors(3).items()}
    mean, var = tensors["running_mean"], tensors["running_var"]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = (mean.clone(), var.clone())
        return library.batch_norm_relu(x, weight, bias, *statistics, training, 0.1, 1e-3)

    return call, [randn(2, 3, 3, 2, dtype=dtype), tensors["weight"], tensors["bias"]]


def inception_call(library: Any, training: bool, dtype: torch.dtype, branch3: int = 3):
    tensors = tree_map_only(Tensor, lambda t: t.to(dtype), inception_tensors(branch3=branch3))
    statistics = list(tensors.values())[3:]

    def call(x: Tensor, *leaves: Tensor) -> Tensor:
        own = [[t.clone() for t in list_] for list_ in statistics]
        lists = (leaves[:6], leaves[6:12], leaves[12:])
        return library.inception(x, *lists, *own, training, 0.1, 1e-3)

    leaves = [t for list_ in list(tensors.values())[:3] for t in list_]
    return call, [randn(2, 17, 4, 3, dtype=dtype), *leaves]


def pool_call(library: Any, training: bool, dtype: torch.dtype = torch.float64):
    return (lambda x: library.max_pool(x, 3, 2, 1, True)), [randn(2, 3, 5, 6, dtype=dtype)]


LIBRARY_CALLS = {"max_pool": pool_call, "batch_norm_relu": bn_call, "inception": inception_call}


@each_mode
@pytest.mark.parametrize("op", ["max_pool", "batch_norm_relu"])
def test_gradcheck(op, training):
    """In float64, where the functions take the reference path."""
    call, inputs = LIBRARY_CALLS[op](functional, training, torch.float64)
    leaves = [as_leaf(t) for t in inputs]
    with CalledOps() as called:
        assert gradcheck(call, leaves)
        assert gradgradcheck(call, leaves)
    assert called.names == []


@each_mode
@each_branch3
def test_gradcheck_of_inception(branch3, training):
    call, inputs = inception_call(functional, training, torch.float64, branch3)
    leaves = [as_leaf(t) for t in inputs]
    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


def second_order(call: Any, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients, and the gradients of a function of them."""
    leaves = [as_leaf(t) for t in inputs]
    y = call(*leaves)
    grad = as_leaf(randn(*y.shape, seed=5).to(y.dtype))
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    penalty = sum((g * randn(*g.shape, seed=6).to(g.dtype)).square().sum() for g in first)
    second = torch.autograd.grad(
        penalty, [*leaves, grad], allow_unused=True, materialize_grads=True
    )
    results = {f"first {i}": g.detach() for i, g in enumerate(first)}
    return results | {f"second {i}": g for i, g in enumerate(second)}


@each_mode
@pytest.mark.parametrize("op", LIBRARY_CALLS)
def test_second_order(op, training):
    ours, eager, exact = (
        second_order(*LIBRARY_CALLS[op](library, training, dtype))
        for library, dtype in (
            (functional, torch.float32),
            (reference, torch.float32),
            (reference, torch.float64),
        )
    )
    assert_all_as_good_as_eager(ours, eager, exact)


@each_mode
@pytest.mark.parametrize("op", LIBRARY_CALLS)
def test_create_graph_gives_the_gradients_of_a_plain_backward(op, training):
    call, inputs = LIBRARY_CALLS[op](functional, training, torch.float32)
    leaves = [as_leaf(t) for t in inputs]
    with CalledOps() as called:
        y = call(*leaves)
        torch.autograd.grad(y.sum(), leaves, create_graph=True)
    assert called.names == [f"{op}_forward"]  # no backward op: it has no derivative
    call, _ = LIBRARY_CALLS[op](functional, training, torch.float32)
    plain = torch.autograd.grad(call(*leaves).sum(), leaves)
    graph = torch.autograd.grad(y.sum(), leaves, create_graph=True)
    torch.testing.assert_close([g.detach() for g in graph], list(plain))


@each_mode
def test_create_graph_with_parameters_made_from_the_input(training):
    """Gradients of the op alone: what flows through the parameters is autograd's to add."""
    results = []
    for library, dtype in (
        (functional, torch.float32),
        (reference, torch.float32),
        (reference, torch.float64),
    ):
        tensors = {name: tensor.to(dtype) for name, tensor in bn_tensors(3).items()}
        x = as_leaf(randn(2, 3, 3, 2, dtype=dtype))
        weight = x.square().mean((0, 2, 3))
        statistics = (tensors["running_mean"], tensors["running_var"])
        y = library.batch_norm_relu(x, weight, weight, *statistics, training, 0.1, 1e-3)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append({"first": first.detach(), "second": second})
    assert_all_as_good_as_eager(*results)
