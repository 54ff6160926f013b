"""What the compiled ops keep to besides values: repeats, threads, schemas, fake kernels, flops."""

from typing import Any

import pytest
import torch
from fast_path import (
    ARRANGEMENTS,
    CALLS,
    bn_tensors,
    inception_tensors,
    op_calls,
    op_of,
    output_of,
    randn,
    strides,
)
from ops_cases import (
    POOLS,
    SCALE,
    SHIFT,
    as_leaf,
    bn_results,
    each_branch3,
    each_dtype,
    each_mode,
    inception_results,
    ops,
    pool_results,
    pooled_like,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from inception_ext import functional, reference

# Repeats and threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def equal_results(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@each_dtype
def test_results_do_not_depend_on_the_number_of_threads(two_threads, dtype):
    x, grad = randn(4, 40, 33, 30, dtype=dtype), randn(4, 40, 33, 30, seed=1, dtype=dtype)
    pool_grad = pooled_like(x, POOLS[0])

    def results() -> dict[str, Tensor]:
        return {
            **bn_results(functional, x, bn_tensors(40), grad, True),
            **{f"pool {k}": v for k, v in pool_results(functional, x, pool_grad, POOLS[0]).items()},
            "image": ops.image_to_nhwc(x[:, :3], SCALE, SHIFT, dtype),
        }

    two = results()
    assert equal_results(results(), two)
    torch.set_num_threads(1)
    assert equal_results(results(), two)


@each_dtype
@each_mode
def test_inception_repeats_bit_for_bit(training, dtype):
    x = randn(2, 24, 14, 14, dtype=dtype)
    grad = randn(2, output_of("even"), 14, 14, seed=1, dtype=dtype)
    tensors = inception_tensors("even", dtype=dtype)
    first = inception_results(functional, x, tensors, grad, training)
    for _ in range(3):
        assert equal_results(inception_results(functional, x, tensors, grad, training), first)


# Manners of custom ops


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, requires_grad):
    arguments = op_calls()[name]
    if requires_grad:
        # All but what the op writes to: the output, the last two of the statistics.
        schema = op_of(name)._schema.arguments
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema]
        arguments = tuple(
            value
            if write
            else tree_map_only(Tensor, lambda t: as_leaf(t) if t.is_floating_point() else t, value)
            for value, write in zip(arguments, written, strict=True)
        )
    torch.library.opcheck(op_of(name), arguments)


@each_dtype
@pytest.mark.parametrize(
    "size",
    [(2, 6, 5), (0, 6, 5), (1, 1, 1), (2, 1, 7), (3, 8, 1)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("arrangement", ["nchw", "channels_last", "channel_slice", "transposed"])
def test_fake_results_look_like_the_real_ones(arrangement, size, dtype):
    def arrange(t: Tensor) -> Tensor:
        return ARRANGEMENTS[arrangement](t) if t.dim() == 4 and t.is_floating_point() else t

    for name, arguments in op_calls(dtype, size).items():
        if name == "copy_channels":
            continue  # returns nothing
        arguments = tree_map_only(Tensor, arrange, arguments)
        real = op_of(name)(*arguments)
        with FakeTensorMode() as mode:
            fake = op_of(name)(*tree_map_only(Tensor, mode.from_tensor, arguments))
        for a, b in zip(tree_flatten(fake)[0], tree_flatten(real)[0], strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), name
            assert strides(a) == strides(b), name


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_fake_max_pool_has_the_real_size(ceil_mode):
    for kernel, stride, padding, size in (
        *((3, 2, 0, 9), (3, 2, 0, 10), (3, 2, 1, 10), (3, 1, 1, 1)),
        *((2, 2, 0, 7), (2, 4, 1, 9), (1, 3, 0, 8)),
    ):
        x = torch.randn(2, 3, size, size + 1)
        window = ([kernel] * 2, [stride] * 2, [padding] * 2, ceil_mode)
        real = ops.max_pool_forward(x, *window, True)
        fake = ops.max_pool_forward(x.to("meta"), *window, True)
        assert [t.shape for t in fake] == [t.shape for t in real]
        assert [strides(t) for t in fake] == [strides(t) for t in real]


@each_branch3
@pytest.mark.parametrize("needs", ["all", "no input", "no weight", "only 3x3"])
def test_flops_are_those_of_the_reference(needs, branch3):
    def count(library: Any) -> int:
        tensors = inception_tensors(branch3=branch3)
        x = randn(2, 17, 7, 6).requires_grad_(needs in ("all", "no weight"))
        for i, weight in enumerate(tensors["conv_weights"]):
            weight.requires_grad_(needs in ("all", "no input") or (needs == "only 3x3" and i == 2))
        for bias in tensors["biases"]:
            bias.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            library.inception(x, *tensors.values(), True, 0.1, 1e-3).sum().backward()
        return counter.get_total_flops()

    assert count(functional) == count(reference) > 0
