"""Training on the CUDA kernels: the Inception module and chains of convolutions, as one op each."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import (
    BLOCK_NOISE_FLOOR,
    NOISE_FLOOR_EPS,
    assert_all_as_good_as_eager,
    assert_as_good_as_eager,
)
from fast_path import CHANNELS, bn_tensors, inception_tensors, output_of, randn
from kernel_devices import (
    each_device,
    exact_products,
    fp32_precision,
    kernel_ops,
    kernels_on,
    needs_emulator,
    torch_device,
)
from ops_cases import as_leaf, inception_results, to_double
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from inception_ext import functional, reference
from inception_ext.modules import Inception
from inception_ext.testing import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS, MOMENTUM = 1e-3, 0.1

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 is multiplied as such; test_tf32 is about the other setting."""
    with exact_products():
        yield


def on_or_off(biases: list[Tensor]) -> None:
    """Makes each channel active or not, wherever one looks: rounding errors decide no ReLU."""
    for i, bias in enumerate(biases):
        bias.copy_(torch.where(torch.arange(len(bias)) % 3 == i % 3, -4.0, 4.0))


def judge(runs: list[tuple[dict[str, Tensor], ...]], dtype: torch.dtype) -> None:
    """Ours, eager's and float64's results, of several inputs together."""
    assert_all_as_good_as_eager(
        *(
            {name: torch.stack([run[name].cpu() for run in side]) for name in side[0]}
            for side in zip(*runs, strict=True)
        ),
        noise_floor=BLOCK_NOISE_FLOOR
        if dtype == torch.float32
        else NOISE_FLOOR_EPS * torch.finfo(dtype).eps,
    )


# The Inception module


def inception_inputs(
    seed: int,
    size: tuple[int, int, int],
    channels: str,
    branch3: int,
    dtype: torch.dtype,
    vectors: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, list[Tensor]], Tensor]:
    n, h, w = size
    x = randn(n, CHANNELS[channels][0], h, w, seed=seed).abs().to(dtype)
    grad = randn(n, output_of(channels), h, w, seed=seed + 10, dtype=dtype)
    tensors = inception_tensors(channels, branch3, dtype, vectors)
    on_or_off(tensors["biases"])
    return x, tensors, grad


@each_device
@each_dtype
@each_mode
@pytest.mark.parametrize("branch3", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(3, 7, 5), (1, 14, 14), (5, 1, 1)], ids=str)
def test_inception(device, size, channels, branch3, training, dtype):
    runs = []
    for seed in (100, 101):
        inputs = inception_inputs(seed, size, channels, branch3, dtype)
        on_device = tree_map_only(Tensor, lambda t: t.to(torch_device(device)), inputs)
        x, tensors, grad = on_device
        with kernels_on(device, seed=seed) as launches:
            ours = inception_results(
                functional, x.to(**CHANNELS_LAST), tensors, grad, training, MOMENTUM, EPS
            )
        assert ours["y"].is_contiguous(**CHANNELS_LAST)
        if device == "emulator":
            ops = [launch["op"] for launch in launches]
            # Five, and one that packs: the weights are contiguous.
            assert ops == ["inception_forward"] * 6 + ["inception_backward"] * 9
        eager, exact = (
            inception_results(reference, *values, training, MOMENTUM, EPS)
            for values in (inputs, to_double(inputs))
        )
        runs.append((ours, eager, exact))
    judge(runs, dtype)


def module(channels: str = "even", **kwargs: Any) -> Inception:
    torch.manual_seed(0)
    c, (k1, r3, k3, r5, k5, kp) = CHANNELS[channels]
    return Inception(c, k1, r3, k3, r5, k5, kp, **kwargs)


def module_step(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    leaf = as_leaf(x)
    y = block(leaf)
    y.backward(randn(*y.shape, seed=1).to(y))
    assert leaf.grad is not None
    results = {"y": y.detach(), "dx": leaf.grad}
    results |= {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return results


@needs_emulator
def test_a_module_is_five_launches_and_nine():
    block = module().half().to(**CHANNELS_LAST)
    x = randn(2, 24, 9, 9).half().to(**CHANNELS_LAST)
    with emulated() as launches:
        module_step(block, x)
    kernels = [launch["kernel"].split("<")[0] for launch in launches]
    assert kernels == [
        "conv_train_kernel",
        "batch_norm_finalize_kernel",
        "conv_train_kernel",
        "batch_norm_finalize_kernel",
        "batch_norm_relu_apply_kernel",
        "pack_weights_kernel",
        "batch_norm_relu_backward_reduce_kernel",
        "batch_norm_relu_backward_apply_kernel",
        "conv_train_kernel",
        "conv_wgrad_kernel",
        "batch_norm_relu_backward_reduce_kernel",
        "batch_norm_relu_backward_apply_kernel",
        "conv_train_kernel",
        "conv_wgrad_kernel",
    ]
    assert int(block.branch1.bn.num_batches_tracked) == 1


@needs_emulator
def test_results_repeat_bit_for_bit():
    block = module().half().to(**CHANNELS_LAST)
    x = randn(3, 24, 14, 14).half().to(**CHANNELS_LAST)
    results = []
    for seed, workers in ((0, 1), (1, 2), (2, 2)):
        with emulated(seed=seed, workers=workers):
            results.append(module_step(block, x))
    for other in results[1:]:
        assert all(torch.equal(other[name], values) for name, values in results[0].items())


@needs_emulator
@pytest.mark.parametrize("frozen", ["branch2.0.conv.weight", "conv.weight", "weight", "x"])
def test_what_needs_no_gradient_gets_none(frozen):
    """And the gradients of the rest are what they are otherwise."""
    block = module()
    x = randn(2, 24, 6, 6).to(**CHANNELS_LAST)
    with emulated() as launches:
        everything = module_step(block, x)
    all_launches = len(launches)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    with emulated() as launches:
        if frozen == "x":
            y = block(x)
            y.backward(randn(*y.shape, seed=1))
            results = {"y": y.detach()}
            results |= {name: p.grad for name, p in block.named_parameters()}
        else:
            results = module_step(block, x)
    assert all(torch.equal(everything[name], values) for name, values in results.items())
    missing = {name for name in everything if name not in results}
    assert missing == {name for name in everything if name.endswith(frozen) or name == "d" + frozen}
    if frozen in ("conv.weight", "weight"):
        assert len(launches) == all_launches - 2  # both weight gradients
    elif frozen == "x":
        assert len(launches) == all_launches - 1  # dx


@needs_emulator
def test_autocast_keeps_master_weights():
    """float32 weights are cast and packed in one launch; their gradients are float32."""
    block, half = module(), module().half()
    half.load_state_dict(block.state_dict())
    for bn in (m for m in half.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.float()
    x = randn(2, 24, 7, 7).half().to(**CHANNELS_LAST)
    with emulated() as launches, torch.autocast("cpu", torch.float16):
        y = block(x)
    with emulated(counting=False):
        y.backward(randn(*y.shape, seed=1).to(y))
        expected = module_step(half.to(**CHANNELS_LAST), x)
    assert y.dtype == torch.float16 and torch.equal(y, expected["y"])
    assert [launch["op"] for launch in launches] == ["inception_forward"] * 6
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        scale = expected[name].abs().max()
        error = (parameter.grad - expected[name]).abs().max() / scale
        assert error <= torch.finfo(torch.float16).eps, name  # theirs are rounded to float16


@each_device
def test_no_images(device):
    x = torch.randn(0, 24, 5, 5, device=torch_device(device))
    block = module().to(torch_device(device))
    with kernels_on(device, counting=False):
        results = module_step(block, x)
    assert results["y"].shape == (0, 64, 5, 5) and results["dx"].shape == x.shape
    assert all(not values.any() for values in results.values())


@needs_emulator
def test_double_backward_takes_the_reference():

    def penalty(dtype: torch.dtype = torch.float32) -> Tensor:
        block, x = module().eval().to(dtype), as_leaf(randn(1, 24, 4, 4, dtype=dtype))
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with emulated(counting=False):
        ours = penalty()
    with functional.use_kernels(False):
        eager = penalty()
    assert_as_good_as_eager(ours, eager, penalty(torch.float64), BLOCK_NOISE_FLOOR)


@needs_emulator
def test_tf32():
    """Factors are rounded to 10 bits where torch's own convolutions may be: errors of that size."""
    x, tensors, grad = inception_inputs(100, (2, 7, 7), "even", 3, torch.float32)
    exact = inception_results(reference, *to_double((x, tensors, grad)), True)
    errors = {}
    for precision in ("ieee", "tf32"):
        with fp32_precision(precision), emulated():
            ours = inception_results(functional, x, tensors, grad, True)
        errors[precision] = {
            name: ((ours[name] - exact[name]).abs().max() / exact[name].abs().max()).item()
            for name in ours
        }
    half_unit = 2.0**-11  # of a factor; two factors, two convolutions in a row, twice eager's
    assert max(errors["ieee"].values()) < half_unit / 64
    assert half_unit / 64 < max(errors["tf32"].values()) < 16 * half_unit


# Chains of convolutions

# [conv (K, kernel, stride, padding), ...], input channels, pool
CHAINS: dict[str, tuple[list[tuple[int, int, int, int]], int, list[int]]] = {
    "stem1": ([(16, 7, 2, 3)], 3, [3, 2, 0, 1]),
    "stem2": ([(16, 1, 1, 0), (24, 3, 1, 1)], 16, [3, 2, 0, 1]),
    "one": ([(24, 1, 1, 0)], 16, []),
    "odd": ([(5, 3, 1, 1), (7, 5, 1, 2)], 3, []),
    "pool2": ([(13, 3, 1, 0)], 5, [2, 2, 0, 1]),
}


def chain_inputs(
    name: str, seed: int, size: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, dict[str, list[Tensor]], tuple[list[int], list[int], list[int]]]:
    convs, channels, pool = CHAINS[name]
    n, h, w = size
    x = randn(n, channels, h, w, seed=seed).to(dtype)
    tensors: dict[str, list[Tensor]] = {"conv_weights": []}
    for k, r, _, _ in convs:
        weight = randn(k, channels, r, r, seed=seed + r) / (channels * r * r) ** 0.5
        tensors["conv_weights"].append(weight.to(dtype))
        for key, value in bn_tensors(k, torch.float32).items():
            tensors.setdefault(key, []).append(value.clone())
        channels = k
    on_or_off(tensors["bias"])
    return x, tensors, ([c[2] for c in convs], [c[3] for c in convs], pool)


def chain_results(
    library: Any,
    x: Tensor,
    tensors: dict[str, list[Tensor]],
    window: tuple[list[int], list[int], list[int]],
    training: bool,
    momentum: float = MOMENTUM,
    eps: float = EPS,
) -> dict[str, Tensor]:
    needs_x = window[0][0] == 1
    leaf = as_leaf(x) if needs_x else x
    leaves = {
        k: [as_leaf(t.clone()) for t in tensors[k]] for k in ("conv_weights", "weight", "bias")
    }
    statistics = {k: [t.clone() for t in tensors[k]] for k in ("running_mean", "running_var")}
    y = library.conv_chain(
        leaf, *leaves.values(), *statistics.values(), *window, training, momentum, eps
    )
    y.backward(randn(*y.shape, seed=7).to(y))
    results = {"y": y.detach()}
    if needs_x:
        assert leaf.grad is not None
        results["dx"] = leaf.grad
    results |= {f"dw{i}": t.grad for i, t in enumerate(leaves["conv_weights"])}
    results |= {f"d{k}": torch.cat([t.grad for t in leaves[k]]) for k in ("weight", "bias")}
    return results | {k: torch.cat(values) for k, values in statistics.items()}


@each_device
@each_dtype
@each_mode
@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [(2, 15, 19), (1, 33, 20)], ids=str)
def test_chain(device, name, size, training, dtype):
    runs = []
    for seed in (100, 101):
        x, tensors, window = chain_inputs(name, seed, size, dtype)
        on_device = tree_map_only(Tensor, lambda t: t.to(torch_device(device)), (x, tensors))
        with kernels_on(device, seed=seed) as launches:
            ours = chain_results(functional, *on_device, window, training)
        if device == "emulator":
            assert {launch["op"] for launch in launches} == {
                "conv_chain_forward",
                "conv_chain_backward",
            }
        eager, exact = (
            chain_results(reference, *values, window, training)
            for values in ((x, tensors), to_double((x, tensors)))
        )
        runs.append((ours, eager, exact))
    judge(runs, dtype)


@needs_emulator
@pytest.mark.parametrize("name", CHAINS)
def test_chain_repeats_bit_for_bit(name):
    x, tensors, window = chain_inputs(name, 3, (3, 17, 18), torch.float16)
    results = []
    for seed in range(3):
        with emulated(seed=seed):
            results.append(chain_results(functional, x, tensors, window, True))
    for other in results[1:]:
        assert all(torch.equal(other[key], values) for key, values in results[0].items())


@needs_emulator
def test_chain_of_no_images():
    x, tensors, window = chain_inputs("stem2", 0, (0, 9, 9), torch.float32)
    with emulated(counting=False):
        ours = chain_results(functional, x, tensors, window, True)
    eager = chain_results(reference, x, tensors, window, True)
    torch.testing.assert_close(ours, eager)


@needs_emulator
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"conv_weights": []}, "conv_weights: expected 1 or 2 tensors, got 0"),
        ({"strides": [1]}, "strides: expected 2 values, got 1"),
        ({"paddings": [0, 3]}, r"conv_weights\[1\]: expected a kernel .* padding 3"),
        ({"pool": [3, 2]}, "pool: expected kernel, stride, padding and ceil mode"),
        ({"pool": [5, 2, 0, 1]}, "pool: expected kernel 2 or 3"),
        ({"weights": []}, "weights: expected 2 tensors, got 0"),
        ({"x": torch.zeros(1, 16, 9)}, "x: expected 4D input, got 3D"),
        ({"x": torch.zeros(1, 15, 9, 9)}, r"conv_weights\[0\]: expected shape \[16, 15, 1, 1\]"),
        ({"x": torch.zeros(1, 16, 9, 9, dtype=torch.float64)}, "x: expected float16 or"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_chain_errors(changes, text):
    x, tensors, (strides, paddings, pool) = chain_inputs("stem2", 0, (1, 9, 9), torch.float32)
    arguments: dict[str, Any] = {
        "x": x,
        "conv_weights": tensors["conv_weights"],
        "weights": tensors["weight"],
        "biases": tensors["bias"],
        "running_means": tensors["running_mean"],
        "running_vars": tensors["running_var"],
        "strides": strides,
        "paddings": paddings,
        "pool": pool,
        "training": True,
        "momentum": 0.1,
        "eps": 1e-3,
        "save": False,
    }
    with pytest.raises(RuntimeError, match=f"conv_chain_forward: {text}"):
        kernel_ops("emulator").conv_chain_forward(**(arguments | changes))
