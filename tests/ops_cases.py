"""What the tests of the compiled ops share: sizes, and calls of an op or of its reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import MEAN, STD
from fast_path import (
    ALL_ARRANGEMENTS,
    CHANNELS,
    DTYPES,
    randn,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inception_ext import reference

ops = torch.ops.inception_ext

Arrange = Callable[[Tensor], Tensor]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_arrangement = pytest.mark.parametrize("arrangement", ALL_ARRANGEMENTS)

# [N, C, H, W]: odd channels, rows and columns of one, batches of one and of none
SHAPES = [
    (3, 17, 7, 5),
    (2, 1, 4, 6),
    (1, 3, 1, 9),
    (3, 5, 8, 1),
    (3, 24, 1, 1),
    (1, 64, 14, 14),
    (0, 8, 5, 5),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def as_leaf(x: Tensor) -> Tensor:
    """The same memory as a leaf of a new graph."""
    return x.detach().requires_grad_()


POOLS = [
    (3, 2, 0, True),
    (3, 1, 1, True),
    (2, 2, 0, True),
    ((2, 3), (1, 2), (1, 0), False),
    (5, 3, 2, False),
]


def pool_results(library: Any, x: Tensor, grad: Tensor, pool: tuple) -> dict[str, Tensor]:
    leaf = as_leaf(x)
    y = library.max_pool(leaf, *pool)
    y.backward(grad)
    return {"y": y.detach(), "dx": leaf.grad}


def pooled_like(x: Tensor, pool: tuple, seed: int = 1) -> Tensor:
    y = reference.max_pool(x, *pool)
    return randn(*y.shape, seed=seed, dtype=x.dtype)


def bn_results(
    library: Any,
    x: Tensor,
    tensors: dict[str, Tensor],
    grad: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-3,
) -> dict[str, Tensor]:
    leaf = as_leaf(x)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    weight, bias = as_leaf(tensors["weight"]), as_leaf(tensors["bias"])
    mean, var = tensors["running_mean"], tensors["running_var"]
    y = library.batch_norm_relu(leaf, weight, bias, mean, var, training, momentum, eps)
    y.backward(grad)
    return {
        "y": y.detach(),
        "dx": leaf.grad,
        "dweight": weight.grad,
        "dbias": bias.grad,
        "running_mean": mean,
        "running_var": var,
    }


each_module = pytest.mark.parametrize("channels", CHANNELS)
each_branch3 = pytest.mark.parametrize("branch3", [3, 5])


def inception_results(
    library: Any,
    x: Tensor,
    tensors: dict[str, list[Tensor]],
    grad: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-3,
) -> dict[str, Tensor]:
    leaf = as_leaf(x)
    leaves = {k: [as_leaf(t.clone()) for t in tensors[k]] for k in list(tensors)[:3]}
    statistics = {k: [t.clone() for t in tensors[k]] for k in list(tensors)[3:]}
    y = library.inception(leaf, *leaves.values(), *statistics.values(), training, momentum, eps)
    y.backward(grad)
    # The vectors of all six together: one of a single channel is nothing to measure errors by.
    return {
        "y": y.detach(),
        "dx": leaf.grad,
        **{f"dconv_weights[{i}]": t.grad for i, t in enumerate(leaves["conv_weights"])},
        **{f"d{name}": torch.cat([t.grad for t in leaves[name]]) for name in ("weights", "biases")},
        **{name: torch.cat(list_) for name, list_ in statistics.items()},
    }


def to_double(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.double, values)


SCALE, SHIFT = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
