"""batch_norm_relu on the CUDA kernels: gate, autograd function and glue."""

from typing import Any

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager
from fast_path import ALL_ARRANGEMENTS, bn_tensors, randn
from kernel_devices import each_device, kernel_ops, kernels_on, needs_emulator, torch_device
from ops_cases import SHAPES, as_leaf, bn_results, to_double
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inception_ext import functional, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD, BACKWARD = "batch_norm_relu_forward", "batch_norm_relu_backward"

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def moved(values: Any, device: str) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(torch_device(device)), values)


def kernel_results(device: str, *arguments: Any, seed: int = 1, **scalars: float) -> Any:
    """Of the kernels, and their launches."""
    with kernels_on(device, seed=seed) as launches:
        results = bn_results(functional, *moved(arguments, device), **scalars)
    return moved(results, "emulator"), launches


def check(device: str, x: Tensor, tensors: Any, grad: Tensor, training: bool, **scalars: float):
    ours, launches = kernel_results(device, x, tensors, grad, training, **scalars)
    eager = bn_results(reference, x, tensors, grad, training, **scalars)
    exact = bn_results(reference, *to_double((x, tensors, grad)), training, **scalars)
    assert_all_as_good_as_eager(ours, eager, exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)
    if device == "emulator" and x.numel():
        assert [launch["op"] for launch in launches] == [FORWARD] * (2 + training) + [BACKWARD] * 2
        assert not any(launch["bank_conflicts"] for launch in launches)


def normalised(
    x: Tensor, tensors: dict[str, Tensor], training: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """xhat, and 1 / standard deviation [C], in float64."""
    values = x.double()
    mean, var = (tensors[f"running_{name}"].double() for name in ("mean", "var"))
    if training:
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    rstd = (var + eps).rsqrt()
    return (values - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1), rstd


def settled(
    x: Tensor, tensors: dict[str, Tensor], training: bool, eps: float = 1e-3
) -> dict[str, Tensor]:
    """With a bias that turns each channel on or off: 16 bits would decide single ReLUs.

    It is a quarter larger than all that it is added to, far beyond rounding errors.
    """
    if x.dtype == torch.float32 or x.numel() == 0:
        return tensors
    xhat, _ = normalised(x, tensors, training, eps)
    size = 1.25 * (xhat * tensors["weight"].double().view(1, -1, 1, 1)).abs().max()
    bias = torch.where(torch.arange(x.shape[1]) % 3 == 0, -size, size)
    return tensors | {"bias": bias.to(tensors["bias"].dtype)}


def rounding_bounds(x: Tensor, tensors: dict[str, Tensor], dy: float) -> dict[str, Tensor]:
    """How large gradients [C] may be that are 0 but for rounding: dy everywhere, no ReLU between.

    The sum of n float32 numbers, in any order, is off by at most n * u of their magnitudes, with
    u = 2^-24, and other operations by u of their results. So these are off by

        mean              (n + 1) u max|x|
        mean(dy)          (n + 1) u |dy|
        mean(dy * xhat)   |dy| ((n + 4) u mean|xhat| + rstd * error of mean)

    and dx = gamma * rstd * (dy - mean(dy) - xhat * mean(dy * xhat)) by what follows, with 8 u for
    its own operations, and a rounding to the dtype of x.
    """
    u, n = 2.0**-24, x.numel() // x.shape[1]
    xhat, rstd = normalised(x, tensors, training=True, eps=1e-3)
    axes = (0, 2, 3)
    of_mean = (n + 1) * u * x.double().abs().amax(axes)
    of_slope = (n + 4) * u * xhat.abs().mean(axes) + rstd * of_mean
    dx = rstd * ((n + 1) * u + xhat.abs().amax(axes) * of_slope) * (1 + 8 * u)
    dx = abs(dy) * tensors["weight"].double().abs() * dx * (1 + torch.finfo(x.dtype).eps)
    return {
        "dx": dx + torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps,
        "dweight": n * abs(dy) * of_slope * (1 + 8 * u),
    }


@each_device
@each_dtype
@each_mode
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_relu(device, shape, training, dtype):
    x, grad = randn(*shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
    for vectors, scalars in (
        (bn_tensors(shape[1]), {}),
        (bn_tensors(shape[1], dtype), {"momentum": 0.7, "eps": 0.1}),
    ):
        if shape[0] == 0 and training:  # nothing to normalise: the reference's business
            ours, launches = kernel_results(device, x, vectors, grad, training, **scalars)
            plain = bn_results(reference, *moved((x, vectors, grad), device), training, **scalars)
            torch.testing.assert_close(ours, moved(plain, "emulator"), equal_nan=True)
            assert not launches
            continue
        tensors = settled(x, vectors, training, scalars.get("eps", 1e-3))
        check(device, x, tensors, grad, training, **scalars)


@each_device
@each_dtype
@each_mode
@pytest.mark.parametrize("arrangement", ALL_ARRANGEMENTS)
def test_any_strides(device, arrangement, training, dtype):
    arrange = ALL_ARRANGEMENTS[arrangement]
    x, grad = randn(3, 16, 7, 6, dtype=dtype), randn(3, 16, 7, 6, seed=1, dtype=dtype)
    check(device, arrange(x), settled(arrange(x), bn_tensors(16), training), grad, training)
    tensors = settled(x, bn_tensors(16), training)
    if arrangement == "one_value" and training and dtype != torch.float32:
        # No ReLU tells the pixels apart: gradients that are zero but for rounding.
        ours, _ = kernel_results(device, x, tensors, arrange(grad), training)
        eager = bn_results(reference, x, tensors, arrange(grad), training)
        for name, bound in rounding_bounds(x, tensors, grad[0, 0, 0, 0].item()).items():
            for gradient in (ours[name], eager[name]):
                sizes = gradient.double().abs()
                assert ((sizes.amax((0, 2, 3)) if name == "dx" else sizes) <= bound).all(), name
    else:
        check(device, x, tensors, arrange(grad), training)


@each_device
@pytest.mark.parametrize("mean", [1e2, 1e4])
@pytest.mark.parametrize("shape", [(2, 6, 16, 16), (1, 40, 3, 5), (4, 8, 40, 40)], ids=str)
def test_large_mean(device, shape, mean):
    x = mean + 1e-2 * randn(*shape, dtype=torch.float64)
    tensors = bn_tensors(shape[1])
    tensors["bias"] = torch.where(torch.arange(shape[1]) % 3 == 0, -12.0, 12.0)
    check(device, x.float(), tensors, randn(*shape, seed=1), training=True, eps=1e-5)


@each_device
@each_dtype
@each_mode
def test_nan_and_infinities(device, training, dtype):
    x = randn(3, 20, 6, 6, dtype=dtype)
    x[0, 1, 2, 3], x[1, 2, 0, 0], x[1, 3, 0, 0] = torch.nan, torch.inf, -torch.inf
    tensors = bn_tensors(20)
    tensors["weight"][5], tensors["bias"][6] = torch.nan, torch.nan
    grad = randn(3, 20, 6, 6, seed=1, dtype=dtype)
    ours, _ = kernel_results(device, x, tensors, grad, training)
    eager = bn_results(reference, x, tensors, grad, training)
    assert torch.equal(ours["y"].isnan(), eager["y"].isnan())
    assert torch.equal(ours["y"].isinf(), eager["y"].isinf())
    for name in ours:  # one channel's NaN is no other's
        channels = ours[name].movedim(-3, 0) if ours[name].dim() == 4 else ours[name]
        assert channels[7:].isfinite().all()


@each_device
@each_mode
def test_same_bits_every_time(device, training):
    x, grad = randn(4, 40, 9, 9, dtype=torch.float16), randn(4, 40, 9, 9, dtype=torch.float16)
    runs = [
        kernel_results(device, x, bn_tensors(40), grad, training, seed=seed)[0] for seed in range(3)
    ]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in runs[0])


@needs_emulator
def test_gradients_that_nobody_needs():
    """A frozen batch norm passes the gradient on; parameters alone get theirs."""
    x = randn(2, 16, 5, 5)
    tensors = bn_tensors(16)
    for leaves in ([0], [1, 2], [2]):
        arguments = [x.clone(), tensors["weight"].clone(), tensors["bias"].clone()]
        runs = []
        for library, dtype in (
            *((functional, torch.float32), (reference, torch.float32)),
            (reference, torch.float64),
        ):
            cast = [a.to(dtype) for a in arguments]
            own = [as_leaf(a) if i in leaves else a for i, a in enumerate(cast)]
            running = [tensors[f"running_{name}"].to(dtype, copy=True) for name in ("mean", "var")]
            with kernels_on("emulator"):
                y = library.batch_norm_relu(*own, *running, True, 0.1, 1e-3)
                y.square().sum().backward()
            runs.append({str(i): own[i].grad for i in leaves})
        assert_all_as_good_as_eager(*runs, BLOCK_NOISE_FLOOR)


@needs_emulator
def test_the_gate():
    """What has no kernel goes the reference way, errors included."""
    tensors = list(bn_tensors(8).values())
    with kernels_on("emulator") as launches:
        double = [tensor.double() for tensor in tensors]
        functional.batch_norm_relu(randn(2, 8, 3, 3).double(), *double, False, 0.1, 1e-3)
        functional.batch_norm_relu(randn(2, 8, 3, 3), None, None, *tensors[2:], True, 0.1, 1e-3)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            functional.batch_norm_relu(randn(1, 8, 1, 1), *tensors, True, 0.1, 1e-3)
    assert launches == []


@needs_emulator
def test_bad_arguments():
    ops = kernel_ops("emulator")
    tensors = bn_tensors(8)
    vectors, x = list(tensors.values()), randn(2, 8, 3, 3)
    scalars, statistics = (True, 0.1, 1e-3), (torch.zeros(8), torch.ones(8))
    for call, message in [
        (lambda: ops.batch_norm_relu_forward(x[0], *vectors, *scalars), "x: expected 4D input"),
        (
            lambda: ops.batch_norm_relu_forward(x.double(), *vectors, *scalars),
            "x: expected float16 or bfloat16 or float32, got float64",
        ),
        (
            lambda: ops.batch_norm_relu_forward(x, vectors[0][:4], *vectors[1:], *scalars),
            r"weight: expected shape \[8\], got \[4\]",
        ),
        (
            lambda: ops.batch_norm_relu_backward(x[:1], x, *vectors[:2], *statistics, True),
            r"grad: expected shape \[2, 8, 3, 3\], got \[1, 8, 3, 3\]",
        ),
        (
            lambda: ops.batch_norm_relu_backward(x.half(), x, *vectors[:2], *statistics, True),
            "grad: expected float32, got float16",
        ),
        (
            lambda: ops.batch_norm_relu_backward(
                x, x, *vectors[:2], statistics[0].half(), statistics[1], True
            ),
            "mean: expected float32, got float16",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@needs_emulator
@each_mode
def test_opcheck(training):
    ops = kernel_ops("emulator")
    x, vectors = randn(2, 8, 3, 3), list(bn_tensors(8).values())
    arguments = (x, *vectors, training, 0.1, 1e-3)
    torch.library.opcheck(ops.batch_norm_relu_forward.default, arguments)
    statistics = (torch.zeros(8), torch.ones(8))
    arguments = (x, x, *vectors[:2], *statistics, training)
    torch.library.opcheck(ops.batch_norm_relu_backward.default, arguments)


@needs_emulator
def test_compiled_with_fullgraph():
    x, vectors = as_leaf(randn(2, 8, 6, 6)), list(bn_tensors(8).values())

    def function(x: Tensor) -> Tensor:
        return functional.batch_norm_relu(x, *vectors, True, 0.1, 1e-3).square()

    with kernels_on("emulator") as launches:
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        y.sum().backward()
        plain = as_leaf(x)
        expected = function(plain)
        expected.sum().backward()
    assert {launch["op"] for launch in launches} == {FORWARD, BACKWARD}
    assert torch.equal(y, expected) and torch.equal(x.grad, plain.grad)
    torch.compiler.reset()


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_touched(dtype):
    """Training reads x twice forward and twice backward, with the gradient; and writes y and dx."""
    x, grad = randn(2, 64, 20, 20, dtype=dtype), randn(2, 64, 20, 20, dtype=dtype)
    _, launches = kernel_results("emulator", x, bn_tensors(64), grad, True)
    size = x.numel() * dtype.itemsize
    small = [
        launch["bytes_touched"] - moves * size
        for launch, moves in zip(launches, (1, 0, 2, 2, 3), strict=True)
    ]
    assert all(0 < rest < 16 * 1024 for rest in small)
