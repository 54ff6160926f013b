"""Each compiled op computes what its plain PyTorch counterpart computes.

Results are held to the float64 reference, as closely as eager PyTorch in the same dtype: forward,
every gradient, running statistics. The Inception module alone, in float64, is test_reference.py's.
"""

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
    CHANNELS,
    DTYPES,
    CalledOps,
    bn_tensors,
    generator,
    inception_tensors,
    output_of,
    randn,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    POOLS,
    SCALE,
    SHIFT,
    Arrange,
    as_leaf,
    bn_results,
    each_arrangement,
    each_branch3,
    each_dtype,
    each_mode,
    each_module,
    each_shape,
    inception_results,
    ops,
    pool_results,
    pooled_like,
    to_double,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inception_ext import autograd, functional, reference

# Max pool


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
