"""What the tests of layers without weights share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_devices import kernels_on, torch_device
from ops_cases import as_leaf
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WINDOW = (5, 1e-4, 0.75, 1.0)  # of the 2014 network: size, alpha, beta, k
STRONG = (5, 2.0, 0.75, 1.0)  # one that matters to normally distributed values
ADAPTIVE, PAPER = (4, 0, 1), (4, 5, 3)  # output size, kernel size, stride

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])

Layer = Callable[[Tensor], Tensor]
Window = tuple[int, float, float, float]


def results(layer: Layer, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    leaf = as_leaf(x)
    y = layer(leaf)
    y.backward(grad)
    assert leaf.grad is not None
    return {"y": y.detach().cpu(), "dx": leaf.grad.cpu()}


def kernel_results(
    device: str, layer: Layer, x: Tensor, grad: Tensor, seed: int = 1
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    with kernels_on(device, seed=seed) as launches:
        ours = results(layer, x.to(torch_device(device)), grad.to(torch_device(device)))
    return ours, launches
