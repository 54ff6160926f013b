"""Batch norm in training behind convolutions whose outputs have a large mean and a small variance.

1e4 +- 1e-2 in float32: ten units in the last place. Lower precisions get as few of theirs.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, NOISE_FLOOR_EPS, assert_all_as_good_as_eager
from fast_path import CHANNELS, bn_tensors, inception_tensors, output_of, randn
from kernel_devices import each_device, exact_products, kernels_on, torch_device
from ops_cases import bn_results, inception_results, to_double
from test_training_kernels import chain_results
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inception_ext import functional, reference

MEANS = {torch.float32: 1e4, torch.float16: 1e3, torch.bfloat16: 1e2}
SEEDS = range(100, 103)

each_dtype = pytest.mark.parametrize("dtype", MEANS, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


def deviation_of(dtype: torch.dtype) -> float:
    return 10 * MEANS[dtype] * torch.finfo(dtype).eps


def settings(dtype: torch.dtype) -> tuple[bool, float, float]:
    """Training; running statistics that are the batch's; an eps far below the variance."""
    return True, 1.0, 0.1 * deviation_of(dtype) ** 2


def images(n: int, c: int, h: int, w: int, seed: int, dtype: torch.dtype) -> Tensor:
    """The last channel is 1."""
    x = randn(n, c, h, w, seed=seed)
    x[:, -1] = 1
    return x.to(dtype)


def with_large_mean(weight: Tensor, seed: int) -> Tensor:
    """A weight whose outputs have it, where the last channel of the input is 1."""
    fan_in = weight[0].numel()
    values = randn(*weight.shape, seed=seed) * (deviation_of(weight.dtype) / fan_in**0.5)
    values[:, -1] = 0
    values[:, -1, weight.shape[2] // 2, weight.shape[3] // 2] = MEANS[weight.dtype]
    return values.to(weight.dtype)


def settled(weight: Tensor, bias: Tensor, feeds: bool) -> None:
    """Each channel on or off, wherever one looks; where it feeds a convolution, the last is 1."""
    bias.copy_(torch.where(torch.arange(len(bias)) % 3 == 0, -12.0, 12.0))
    if feeds:
        weight[-1], bias[-1] = 0, 1


def by_scale(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the constant channel is larger by far than those of the others."""
    results = {name: values.cpu() for name, values in results.items()}
    if "dx" in results:
        dx = results.pop("dx")
        results |= {"dx": dx[:, :-1], "dx of the constant": dx[:, -1:]}
    return results


def judge(device: str, dtype: torch.dtype, run: Any, inputs: list[Any]) -> None:
    """run(library, *inputs) by the kernels, by eager and in float64, of all inputs together."""
    sides: list[list[dict[str, Tensor]]] = [[], [], []]
    for seed, values in enumerate(inputs):
        on_device = tree_map_only(Tensor, lambda t: t.to(torch_device(device)), values)
        with kernels_on(device, seed=seed) as launches:
            sides[0].append(by_scale(run(functional, *on_device)))
        assert launches or device != "emulator"
        sides[1].append(by_scale(run(reference, *values)))
        sides[2].append(by_scale(run(reference, *to_double(values))))
    eps = torch.finfo(dtype).eps
    assert_all_as_good_as_eager(
        *({k: torch.stack([r[k] for r in side]) for k in side[0]} for side in sides),
        noise_floor=BLOCK_NOISE_FLOOR if dtype == torch.float32 else NOISE_FLOOR_EPS * eps,
    )


@each_device
@each_dtype
@pytest.mark.parametrize("branch3", [3, 5])
@pytest.mark.parametrize("channels", CHANNELS)
def test_inception(device, channels, branch3, dtype):
    inputs = []
    for seed in SEEDS:
        x = images(3, CHANNELS[channels][0], 9, 11, seed, dtype)
        tensors = inception_tensors(channels, branch3, dtype)
        weights = tensors["conv_weights"]
        tensors["conv_weights"] = [with_large_mean(w, seed + i) for i, w in enumerate(weights)]
        for i in range(6):
            settled(tensors["weights"][i], tensors["biases"][i], feeds=i in (1, 3))
        grad = randn(3, output_of(channels), 9, 11, seed=seed + 10, dtype=dtype)
        inputs.append((x, tensors, grad))
    judge(device, dtype, lambda *a: inception_results(*a, *settings(dtype)), inputs)


# [conv (K, kernel, padding), ...], input channels, pool
CHAINS: dict[str, tuple[list[tuple[int, int, int]], int, list[int]]] = {
    "one": ([(24, 3, 1)], 16, []),
    "odd": ([(7, 1, 0)], 5, []),
    "two": ([(16, 1, 0), (24, 3, 1)], 16, []),
    "pooled": ([(16, 1, 0), (24, 3, 1)], 16, [3, 2, 0, 1]),
}


@each_device
@each_dtype
@pytest.mark.parametrize("name", CHAINS)
def test_chain(device, name, dtype):
    convs, c, pool = CHAINS[name]
    window = ([1] * len(convs), [padding for _, _, padding in convs], pool)
    inputs = []
    for seed in SEEDS:
        x, channels = images(2, c, 17, 13, seed, dtype), c
        tensors: dict[str, list[Tensor]] = {"conv_weights": []}
        for i, (k, r, _) in enumerate(convs):
            shape = torch.empty(k, channels, r, r, dtype=dtype)
            tensors["conv_weights"].append(with_large_mean(shape, seed + i))
            vectors = bn_tensors(k)
            settled(vectors["weight"], vectors["bias"], feeds=i + 1 < len(convs))
            for key, values in vectors.items():
                tensors.setdefault(key, []).append(values)
            channels = k
        inputs.append((x, tensors))
    judge(device, dtype, lambda *a: chain_results(*a, window, *settings(dtype)), inputs)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", [(2, 6, 16, 16), (1, 40, 3, 5), (4, 8, 40, 40)], ids=str)
def test_batch_norm_relu(device, shape, dtype):
    inputs = []
    for seed in SEEDS:
        x = MEANS[dtype] + deviation_of(dtype) * randn(*shape, seed=seed, dtype=torch.float64)
        tensors = bn_tensors(shape[1])
        settled(tensors["weight"], tensors["bias"], feeds=False)
        inputs.append((x.to(dtype), tensors, randn(*shape, seed=seed + 10, dtype=dtype)))
    judge(device, dtype, lambda *a: bn_results(*a, *settings(dtype)), inputs)
