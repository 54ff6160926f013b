"""What the tests of the gate share: a block, and how its results are judged."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager
from fast_path import CalledOps, randn
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from inception_ext import functional
from inception_ext.modules import Inception

FUSED = ["inception_forward", "inception_backward"]
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make_block(**kwargs: int) -> Inception:
    torch.manual_seed(0)
    block = Inception(16, 8, 8, 12, 4, 8, 8, **kwargs)
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.3)
            nn.init.uniform_(bn.running_mean, -0.3, 0.3)
            nn.init.uniform_(bn.running_var, 0.5, 1.5)
    return block


X = randn(3, 16, 7, 6, seed=1)


def results_of(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward pass."""
    leaf = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = module(leaf)
    y.backward(randn(*y.shape, seed=2).to(y.dtype))
    results = {"y": y.detach(), "dx": leaf.grad}
    results |= {f"{k}.grad": p.grad for k, p in module.named_parameters() if p.grad is not None}
    return results | {k: b.clone() for k, b in module.named_buffers()}


def check(
    module: nn.Module | Callable[[], nn.Module], x: Tensor = X, kernels: bool | None = None
) -> list[str]:
    """Judges a module's results in train and in eval mode, and returns the ops that were called.

    Args:
        module: of which copies are taken, or a function that makes it.
        kernels: whether all of it runs fused, or (False) no compiled op may run; None: not asked.
    """
    make = (lambda: copy.deepcopy(module)) if isinstance(module, nn.Module) else module
    called = []
    for training in (True, False):
        with CalledOps() as ours_called:
            ours = results_of(make().train(training), x)
        with functional.use_kernels(False), CalledOps() as plain_called:
            plain = results_of(make().train(training), x)
            exact = results_of(make().train(training).double(), x.double())
        assert_all_as_good_as_eager(ours, plain, exact, BLOCK_NOISE_FLOOR)
        assert plain_called.names == []
        called += ours_called.names
    if kernels is not None:
        assert called == (FUSED * 2 if kernels else [])
    return called


def check_not_fused(module: nn.Module | Callable[[], nn.Module]) -> None:
    called = check(module)
    assert not any(name.startswith("inception") for name in called), called


def without_kernels(function: Callable[[], object]) -> object:
    with functional.use_kernels(False):
        return function()


def assert_plain(function: Callable[[], object]) -> None:
    with CalledOps() as called:
        ours = function()
    assert called.names == []
    torch.testing.assert_close(ours, without_kernels(function))


def saved_storages(run: Callable[[], Tensor]) -> tuple[Tensor, list[StorageWeakRef]]:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return y, saved


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
