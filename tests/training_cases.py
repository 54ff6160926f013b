"""What the tests of training on the CUDA kernels share: blocks, a small network, a step."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from fast_path import randn
from kernel_devices import torch_device
from torch import Tensor, nn

import inception_ext
from inception_ext._batch_norms import batch_norm_relu
from inception_ext.modules import BasicConv2d, Inception, InceptionAux, conv_chain


class Chain(nn.Module):
    """Two convolutions and a pool, one op: as conv2, conv3 and pool 2 of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BasicConv2d(16, 8, kernel_size=1)
        self.second = BasicConv2d(8, 24, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return conv_chain([self.first, self.second], self.pool, x)


class BatchNormRelu(nn.Module):
    """As behind a convolution that no kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(16, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm_relu(self.bn, x)


@dataclass(frozen=True)
class Case:
    """A module of one op. saved: of the tensors that its forward keeps, without parameters."""

    build: Callable[[], nn.Module]
    op: str
    saved: int

    def module(self, device: str = "emulator") -> nn.Module:
        """With batch norms whose parameters tell channels apart; the same at each call."""
        torch.manual_seed(0)
        return enliven(self.build()).to(torch_device(device))

    def x(self, device: str = "emulator", dtype: torch.dtype = torch.float32) -> Tensor:
        return randn(3, 16, 7, 6, seed=1).to(torch_device(device), dtype)


# Inception keeps x, four convolutions' outputs, the pool's index, mean and rstd of all; a chain x,
# two outputs, the index, mean and rstd; where an op keeps nothing of a kind, an empty tensor.
CASES = {
    "inception": Case(lambda: Inception(16, 8, 8, 16, 4, 8, 8), "inception", 11),
    "chain": Case(Chain, "conv_chain", 6),
    "conv": Case(lambda: BasicConv2d(16, 8, kernel_size=1), "conv_chain", 6),
    "batch_norm": Case(BatchNormRelu, "batch_norm_relu", 3),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def enliven(module: nn.Module) -> nn.Module:
    for bn in module.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.3)
    return module


def decided(module: nn.Module) -> nn.Module:
    """Every channel active or not, whatever comes in: rounding errors decide no ReLU."""
    with torch.no_grad():
        for i, bn in enumerate(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.bias.copy_(torch.where(torch.arange(len(bn.bias)) % 3 == i % 3, -4.0, 4.0))
    return module


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def output_gradient(y: Tensor) -> Tensor:
    return randn(*y.shape, seed=2).to(y)


def step(module: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output and gradient of x of a forward and backward pass; parameters get their ``grad``."""
    leaf = leaf_of(x)
    y = module(leaf)
    y.backward(output_gradient(y))
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.grad is not None}


def results_of(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All that a step leaves: output, gradients, buffers."""
    module.zero_grad()
    found = step(module, x) | gradients(module)
    return {k: v.clone() for k, v in (found | dict(module.named_buffers())).items()}


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name


def small_googlenet(narrow: int = 8) -> inception_ext.GoogLeNet:
    """All modules and both heads, of 1 / narrow of the channels; 10 classes, no dropout."""

    def conv(c: int, k: int, **kwargs: int) -> BasicConv2d:
        return BasicConv2d(c if c == 3 else c // narrow, k // narrow, **kwargs)

    def inception(c: int, *widths: int) -> Inception:
        return Inception(c // narrow, *(width // narrow for width in widths))

    def head(c: int, num_classes: int, dropout: float) -> InceptionAux:
        return InceptionAux(c // narrow, num_classes, dropout=dropout)

    model = inception_ext.GoogLeNet(
        10, init_weights=False, blocks=[conv, inception, head], dropout=0.0, dropout_aux=0.0
    )
    model.fc = nn.Linear(1024 // narrow, 10)
    return model
