"""Each compiled op computes what its plain PyTorch counterpart computes.

Results are held to the float64 reference, as closely as eager PyTorch in the same dtype: forward,
every gradient, running statistics. The Inception module alone, in float64, is test_reference.py's.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import (
    BLOCK_NOISE_FLOOR,
    NOISE_FLOOR_EPS,
    assert_all_as_good_as_eager,
    assert_as_good_as_eager,
)
from fast_path import (
    ALL_ARRANGEMENTS,
    ARRANGEMENTS,
    CALLS,
    CHANNELS,
    DTYPES,
    CalledOps,
    bn_tensors,
    generator,
    inception_tensors,
    op_calls,
    op_of,
    output_of,
    randn,
    strides,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from inception_ext import autograd, functional, reference

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


# Max pool

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


def compiled_max_pool(x: Tensor, *pool: Any) -> Tensor:
    """The op itself, for inputs too that functional leaves to the reference."""
    *window, ceil_mode = pool
    pairs = ((sizes, sizes) if isinstance(sizes, int) else sizes for sizes in window)
    return autograd.MaxPool.apply(x, *map(list, pairs), ceil_mode)


compiled = SimpleNamespace(max_pool=compiled_max_pool)


def check_pool(x: Tensor, grad: Tensor, pool: tuple) -> None:
    with CalledOps() as called:
        ours = pool_results(compiled, x, grad, pool)
    assert called.names == ["max_pool_forward", "max_pool_backward"]
    eager = pool_results(reference, x, grad, pool)
    exact = pool_results(reference, x.double(), grad.double(), pool)
    assert_all_as_good_as_eager(ours, eager, exact)
    torch.testing.assert_close(ours["y"], eager["y"], rtol=0, atol=0, equal_nan=True)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():  # without indices
        torch.testing.assert_close(
            functional.max_pool(x, *pool), eager["y"], rtol=0, atol=0, equal_nan=True
        )


def pooled_like(x: Tensor, pool: tuple, seed: int = 1) -> Tensor:
    y = reference.max_pool(x, *pool)
    return randn(*y.shape, seed=seed, dtype=x.dtype)


@each_dtype
@pytest.mark.parametrize("pool", POOLS, ids=str)
@each_shape
def test_max_pool(shape, pool, dtype):
    x = randn(*shape, dtype=dtype).round().relu()  # half of it ties
    try:
        grad = pooled_like(x, pool)
    except RuntimeError:
        for library in (compiled, functional):
            with pytest.raises(RuntimeError, match="Output size is too small"):
                library.max_pool(x, *pool)
        return
    check_pool(x, grad, pool)


@each_dtype
@each_arrangement
def test_max_pool_takes_any_strides(arrangement, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    x = randn(3, 9, 7, 6, dtype=dtype).round().relu()
    for pool in POOLS[:2]:
        grad = pooled_like(x, pool)
        check_pool(arrange(x), grad, pool)
        check_pool(x, arrange(grad), pool)


@each_dtype
@pytest.mark.parametrize("pool", POOLS[:3], ids=str)
def test_max_pool_of_special_values(pool, dtype):
    x = randn(3, 20, 9, 9, dtype=dtype).round()
    chance = torch.rand(x.shape, generator=generator(2))
    x[chance < 0.1] = torch.nan
    x[chance > 0.5] = -torch.inf
    x[chance > 0.95] = torch.inf
    x[0, :10] = -torch.inf
    x[0, 10:] = torch.nan
    x[1, :10] = torch.where(x[1, :10] > 0, 0.0, -0.0)
    check_pool(x, pooled_like(x, pool), pool)


def test_max_pool_ties_go_to_the_first():
    x = torch.zeros(1, 40, 6, 6).to(memory_format=torch.channels_last)
    grads = pool_results(functional, x, torch.ones(1, 40, 3, 3), (2, 2, 0, False))["dx"]
    assert torch.equal(grads[:, :, ::2, ::2], torch.ones(1, 40, 3, 3)) and grads.sum() == 9 * 40


@st.composite
def pool_cases(draw):
    axis = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.integers(1, 12))
    (kh, sh, ph, h), (kw, sw, pw, w) = draw(axis), draw(axis)
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 33)), h, w)
    pool = ((kh, kw), (sh, sw), (min(ph, kh // 2), min(pw, kw // 2)), draw(st.booleans()))
    return shape, pool, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**16))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pool_cases())
def test_max_pool_with_any_window(case):
    shape, pool, dtype, seed = case
    # Few values, so that there are ties; whole numbers, so that sums of gradients are exact.
    x = randn(*shape, seed=seed).mul(2).round().to(dtype)
    x[torch.rand(shape, generator=generator(seed)) < 0.05] = torch.nan
    x[torch.rand(shape, generator=generator(seed + 1)) < 0.1] = -torch.inf
    x = list(ARRANGEMENTS.values())[seed % len(ARRANGEMENTS)](x)
    try:
        expected = reference.max_pool(x, *pool)
    except RuntimeError:
        for library in (compiled, functional):
            with pytest.raises(RuntimeError, match="Output size is too small"):
                library.max_pool(x, *pool)
        return
    grad = torch.randint(-4, 5, expected.shape, generator=generator(seed)).to(dtype)
    ours = pool_results(compiled, x, grad, pool)
    eager = pool_results(reference, x.double(), grad.double(), pool)
    torch.testing.assert_close(ours["y"], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ours["dx"].double(), eager["dx"], rtol=0, atol=0)


# Batch norm + ReLU


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


def check_bn(
    x: Tensor, tensors: dict[str, Tensor], grad: Tensor, training: bool, **kwargs: float
) -> None:
    with CalledOps() as called:
        ours = bn_results(functional, x, tensors, grad, training, **kwargs)
    assert called.names == ["batch_norm_relu_forward", "batch_norm_relu_backward"]
    eager = bn_results(reference, x, tensors, grad, training, **kwargs)
    exact = bn_results(reference, *to_double((x, tensors, grad)), training, **kwargs)
    assert_all_as_good_as_eager(ours, eager, exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


@each_dtype
@each_mode
@each_shape
def test_batch_norm_relu(shape, training, dtype):
    x = randn(*shape, dtype=dtype)
    grad = randn(*shape, seed=1, dtype=dtype)
    for tensors, scalars in (
        (bn_tensors(shape[1]), {}),
        (bn_tensors(shape[1], dtype), {"momentum": 0.7, "eps": 0.1}),
    ):
        if shape[0] == 0 and training:  # nothing to normalise: the reference's business
            ours = bn_results(functional, x, tensors, grad, training, **scalars)
            torch.testing.assert_close(
                ours, bn_results(reference, x, tensors, grad, training, **scalars)
            )
        else:
            check_bn(x, tensors, grad, training, **scalars)


@each_dtype
@each_mode
@each_arrangement
def test_batch_norm_relu_takes_any_strides(arrangement, training, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    x, grad = randn(3, 9, 7, 6, dtype=dtype), randn(3, 9, 7, 6, seed=1, dtype=dtype)
    check_bn(x, bn_tensors(9), arrange(grad), training)
    check_bn(arrange(x), bn_tensors(9), grad, training)


@each_mode
def test_batch_norm_relu_takes_vectors_of_any_strides(training):
    wide = {k: torch.stack([v, torch.full_like(v, torch.nan)], 1) for k, v in bn_tensors(9).items()}
    tensors = {k: v[:, 0] for k, v in wide.items()}
    x, grad = randn(3, 9, 7, 6), randn(3, 9, 7, 6, seed=1)
    # As they are: bn_results() would copy the running statistics to contiguous ones.
    mean, var = tensors["running_mean"], tensors["running_var"]
    leaves = [as_leaf(t) for t in (x, tensors["weight"], tensors["bias"])]
    y = functional.batch_norm_relu(*leaves, mean, var, training, 0.1, 1e-3)
    y.backward(grad)
    expected = bn_results(functional, x, bn_tensors(9), grad, training)
    actual = [y.detach(), *(leaf.grad for leaf in leaves), mean, var]
    for a, e in zip(actual, expected.values(), strict=True):
        assert torch.equal(a, e)
    assert all(v[:, 1].isnan().all() for v in wide.values())


@each_dtype
@each_mode
def test_batch_norm_relu_of_a_slice_of_a_cat(training, dtype):
    """The gradient of one part of a cat is a channel slice of the whole's."""
    xs = [randn(2, c, 5, 4, seed=c, dtype=dtype) for c in (3, 17, 8)]
    outer = randn(2, 28, 5, 4, seed=1, dtype=dtype)
    results = []
    for library, to in ((functional, dtype), (reference, dtype), (reference, torch.float64)):
        leaves = [as_leaf(x.to(to)) for x in xs]
        parts = [
            library.batch_norm_relu(
                leaf, *(t.to(to) for t in bn_tensors(leaf.shape[1]).values()), training, 0.1, 1e-3
            )
            for leaf in leaves
        ]
        torch.cat(parts, 1).backward(outer.to(to))
        results.append({str(i): leaf.grad for i, leaf in enumerate(leaves)})
    assert_all_as_good_as_eager(*results)


@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("shape", [(2, 6, 16, 16), (1, 40, 3, 5)], ids=str)
def test_batch_norm_relu_of_a_large_mean(shape, mean):
    """The deviation is a millionth of the mean: E[x^2] - E[x]^2 would hold nothing but noise."""
    x = mean + 1e-2 * randn(*shape, dtype=torch.float64)
    tensors = bn_tensors(shape[1])
    # Rounding errors would decide ReLUs; here every third channel is off, the others are on.
    tensors["bias"] = torch.where(torch.arange(shape[1]) % 3 == 0, -12.0, 12.0)
    check_bn(x.float(), tensors, randn(*shape, seed=1), training=True, eps=1e-5)


@each_dtype
@each_mode
def test_batch_norm_relu_keeps_nan_and_infinities(training, dtype):
    x = randn(3, 20, 6, 6, dtype=dtype)
    x[0, 1, 2, 3] = torch.nan
    x[1, 2, 0, 0] = torch.inf
    x[1, 3, 0, 0] = -torch.inf
    tensors = bn_tensors(20)
    tensors["weight"][5] = torch.nan
    tensors["bias"][6] = torch.nan
    grad = randn(3, 20, 6, 6, seed=1, dtype=dtype)
    ours = bn_results(functional, x, tensors, grad, training)
    eager = bn_results(reference, x, tensors, grad, training)
    assert torch.equal(ours["y"].isnan(), eager["y"].isnan())
    assert torch.equal(ours["y"].isinf(), eager["y"].isinf())
    for name in ours:  # one channel's NaN is no other's
        torch.testing.assert_close(
            ours[name].movedim(-3, 0)[7:] if ours[name].dim() == 4 else ours[name][7:],
            eager[name].movedim(-3, 0)[7:] if eager[name].dim() == 4 else eager[name][7:],
        )


# Inception

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


def check_inception(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    training: bool,
    channels: str = "odd",
    branch3: int = 3,
    arrange: Arrange = torch.Tensor.contiguous,
    arrange_grad: Arrange = torch.Tensor.contiguous,
    vectors: torch.dtype = torch.float32,
    mean: float = 0.0,
    **scalars: float,
) -> None:
    """Judges ours on images of [N, H, W].

    Over several inputs together, so that the errors depend less on luck. In bfloat16, and next to
    a large mean, rounding errors would decide ReLUs; there each channel is active or is not,
    wherever one looks.
    """
    n, h, w = size
    runs = []
    for seed in range(100, 104):
        x = (mean + randn(n, CHANNELS[channels][0], h, w, seed=seed).abs()).to(dtype)
        grad = randn(n, output_of(channels), h, w, seed=seed + 10, dtype=dtype)
        tensors = inception_tensors(channels, branch3, dtype, vectors)
        if dtype == torch.bfloat16 or mean:
            for i, bias in enumerate(tensors["biases"]):
                bias.copy_(torch.where(torch.arange(len(bias)) % 3 == i % 3, -4.0, 4.0))
        inputs = (arrange(x), tensors, arrange_grad(grad), training)
        with CalledOps() as called:
            ours = inception_results(functional, *inputs, **scalars)
        assert called.names == ["inception_forward", "inception_backward"]
        assert ours["y"].is_contiguous(memory_format=torch.channels_last)
        eager = inception_results(reference, *inputs, **scalars)
        exact = inception_results(reference, *to_double(inputs), **scalars)
        runs.append((ours, eager, exact))
    assert_all_as_good_as_eager(
        *(
            {name: torch.stack([run[name] for run in side]) for name in side[0]}
            for side in zip(*runs, strict=True)
        ),
        # Of the dtype that everything passes through; gradients of vectors are float32.
        noise_floor=BLOCK_NOISE_FLOOR
        if dtype == torch.float32
        else NOISE_FLOOR_EPS * torch.finfo(dtype).eps,
    )


@each_dtype
@each_mode
@each_branch3
@each_module
@pytest.mark.parametrize("size", [(3, 7, 5), (1, 14, 14), (2, 1, 9), (3, 8, 1), (5, 1, 1)], ids=str)
def test_inception(size, channels, branch3, training, dtype):
    check_inception(size, dtype, training, channels, branch3)
    check_inception(size, dtype, training, channels, branch3, vectors=dtype, momentum=0.7, eps=0.1)


@each_mode
def test_inception_of_no_images(training):
    if not training:
        check_inception((0, 5, 5), torch.float32, training)
    x, grad = torch.randn(0, 17, 5, 5), torch.randn(0, output_of("odd"), 5, 5)
    ours, eager = (
        inception_results(library, x, inception_tensors(), grad, training)
        for library in (functional, reference)
    )
    torch.testing.assert_close(ours, eager)


@each_dtype
@each_mode
@each_arrangement
def test_inception_takes_any_strides(arrangement, training, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    # In training, gradients are nothing but noise where the input has no variance, or where their
    # own mean is all that they have and no ReLU cuts into it.
    is_constant = training and arrangement == "one_value"
    if not is_constant:
        check_inception((3, 7, 6), dtype, training, arrange=arrange)
    if not (is_constant and dtype == torch.bfloat16):
        check_inception((3, 7, 6), dtype, training, arrange_grad=arrange)


@each_dtype
@each_mode
@pytest.mark.parametrize("arrange", list(ARRANGEMENTS.values())[1:], ids=list(ARRANGEMENTS)[1:])
def test_inception_takes_weights_of_any_strides(arrange, training, dtype):
    x = randn(2, 17, 7, 6, dtype=dtype)
    grad = randn(2, output_of("odd"), 7, 6, seed=1, dtype=dtype)
    tensors = inception_tensors(branch3=5, dtype=dtype)
    expected = inception_results(functional, x, tensors, grad, training)
    tensors = inception_tensors(branch3=5, dtype=dtype)
    leaves = [
        [as_leaf(arrange(weight)) for weight in tensors["conv_weights"]],
        *([as_leaf(t) for t in tensors[name]] for name in ("weights", "biases")),
    ]
    statistics = [tensors["running_means"], tensors["running_vars"]]
    y = functional.inception(x, *leaves, *statistics, training, 0.1, 1e-3)
    y.backward(grad)
    assert torch.equal(y, expected["y"])
    for i, weight in enumerate(leaves[0]):
        assert torch.equal(weight.grad, expected[f"dconv_weights[{i}]"])


@each_mode
@each_branch3
def test_inception_in_a_chain(branch3, training):
    """As in the network: the gradient comes from a sum over slices, the input from an op."""
    tensors = [inception_tensors("even", branch3, torch.float32) for _ in range(2)]
    results = []
    for library, dtype in (
        (functional, torch.float32),
        (reference, torch.float32),
        (reference, torch.float64),
    ):
        first, second = tree_map_only(Tensor, lambda t, to=dtype: t.to(to, copy=True), tensors)
        leaf = as_leaf(randn(2, 24, 8, 8).to(dtype))
        y = library.max_pool(leaf, 3, 2, 0, True)
        y = library.inception(y, *first.values(), training, 0.1, 1e-3)
        z = library.inception(y[:, 8:32], *second.values(), training, 0.1, 1e-3)
        (z.sum() + y[:, ::3].square().sum()).backward()
        results.append({"y": y.detach(), "z": z.detach(), "dx": leaf.grad})
    assert_all_as_good_as_eager(*results)


@each_mode
def test_inception_of_special_values(training):
    x = randn(4, 17, 9, 9)
    x[1, 3, 4, 4] = torch.nan
    grad = randn(4, output_of("odd"), 9, 9, seed=1)
    ours, eager = (
        inception_results(library, x, inception_tensors(), grad, training)
        for library in (functional, reference)
    )
    for name in ours:
        assert torch.equal(ours[name].isnan(), eager[name].isnan()), name
    if not training:
        assert not ours["y"][[0, 2, 3]].isnan().any() and ours["y"][1].isnan().any()

    x = randn(4, 17, 9, 9)
    x[1, :, 2:7, 2:7] = -torch.inf  # whole windows of it
    ours, eager = (
        inception_results(library, x, inception_tensors(), grad, training)
        for library in (functional, reference)
    )
    assert torch.equal(ours["y"].isnan(), eager["y"].isnan())


def test_inception_with_a_large_mean():
    """Every first convolution's output has a mean a thousand times its deviation."""
    check_inception((2, 8, 8), torch.float32, True, "even", mean=1000.0)


# Images and copies

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, SHIFT = [1 / (255 * s) for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]


def images(n: int, h: int, w: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, h, w), generator=generator(3), dtype=torch.uint8)


def per_channel(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype).view(3, 1, 1)


@each_dtype
@pytest.mark.parametrize("size", [(2, 7, 5), (1, 1, 1), (0, 4, 4), (1, 33, 47)], ids=str)
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_image_to_nhwc(kind, size, dtype):
    x = images(*size).to(kind)
    eager = (x.float() * per_channel(SCALE, torch.float32) + per_channel(SHIFT, torch.float32)).to(
        dtype
    )
    exact = x.double() * per_channel(SCALE, torch.float64) + per_channel(SHIFT, torch.float64)
    arrangements = dict(ARRANGEMENTS)
    if kind == torch.uint8:  # no NaN to surround it with
        arrangements = {k: arrangements[k] for k in ("nchw", "channels_last", "transposed")}
        arrangements["nhwc"] = lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        arrangements["sliced"] = lambda x: torch.cat([x, x], 3)[..., : x.shape[3]]
        arrangements["flipped"] = lambda x: x.flip(3).flip(3)
    for arrange in arrangements.values():
        y = ops.image_to_nhwc(arrange(x), SCALE, SHIFT, dtype)
        assert_as_good_as_eager(y, eager, exact)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_image_to_nhwc_keeps_what_needs_no_change():
    x = randn(2, 3, 9, 7)
    x[0, 1, 2, 3], x[1, 2, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    y = ops.image_to_nhwc(x, [1.0] * 3, [0.0] * 3, torch.float32)
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    one = ops.image_to_nhwc(x[:, :1].expand(2, 3, 9, 7), [1.0] * 3, [0.0] * 3, torch.float32)
    torch.testing.assert_close(one, x[:, :1].expand_as(x), rtol=0, atol=0, equal_nan=True)


@each_dtype
@each_arrangement
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_copy_channels(offset, arrangement, dtype):
    x = randn(3, 5, 4, 6, dtype=dtype)
    arranged = ALL_ARRANGEMENTS[arrangement](x)
    for wide in (
        torch.full((3, 12, 4, 6), torch.nan, dtype=dtype).to(memory_format=torch.channels_last),
        ARRANGEMENTS["channel_slice"](torch.full((3, 12, 4, 6), torch.nan, dtype=dtype)),
    ):
        ops.copy_channels(wide, arranged, offset)
        assert torch.equal(wide[:, offset : offset + 5], arranged)
        assert wide[:, :offset].isnan().all() and wide[:, offset + 5 :].isnan().all()


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


# Derivatives of first and second order


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
