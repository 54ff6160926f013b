"""The auxiliary heads, and the network of 2014, in training on the CUDA kernels."""

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from closeness import assert_network_as_good_as_eager
from fast_path import randn
from kernel_devices import each_device, exact_products, kernels_on, needs_emulator, torch_device
from test_avg_pool_and_lrn import eager_lrn
from test_ops import as_leaf
from torch import Tensor, nn

from inception_ext import InceptionAux
from inception_ext.bvlc import BVLCInceptionAux, bvlc_googlenet
from inception_ext.functional import use_kernels
from inception_ext.testing import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HEADS = {"torchvision": InceptionAux, "paper": BVLCInceptionAux}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
each_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


def make_head(head: str, channels: int = 24) -> nn.Module:
    torch.manual_seed(0)
    module = HEADS[head](channels, 10, dropout=0.0).double()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, 0.5, 1.0)
    return module


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, every gradient and the running statistics of one step."""
    leaf = as_leaf(x)
    y = module(leaf)
    y.square().sum().backward()
    results = {"y": y.detach(), "x.grad": leaf.grad}
    results |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    results |= {name: b.clone() for name, b in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    return {name: values.cpu() for name, values in results.items() if values is not None}


@each_device
@each_dtype
@each_head
@pytest.mark.parametrize("size", [(14, 14), (4, 4), (13, 9)], ids=str)
def test_a_head(device, size, head, dtype):
    exact = make_head(head)
    ours, eager = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(dtype)
    x = randn(3, 24, *size, dtype=dtype).relu()
    with kernels_on(device, seed=2) as launches:
        found = step(ours.to(torch_device(device)), x.to(torch_device(device)))
    with use_kernels(False):
        expected = step(eager, x), step(exact, x.double())
    assert_network_as_good_as_eager(found, *expected)
    if device == "emulator":
        ops = {launch["op"] for launch in launches}
        assert {"aux_pool_forward", "aux_pool_backward"} <= ops


@needs_emulator
def test_launches_of_a_head():
    """Pool, convolution, its statistics, batch norm + ReLU; five for these back, and the pool."""
    head = make_head("torchvision", 512).half().to(memory_format=torch.channels_last)
    x = randn(2, 512, 14, 14).half().to(memory_format=torch.channels_last)
    with emulated() as launches:
        step(head, x)
    assert [launch["kernel"].split("<")[0] for launch in launches] == [
        "avg_pool_forward_kernel",
        "conv_train_kernel",
        "batch_norm_finalize_kernel",
        "batch_norm_relu_apply_kernel",
        "pack_weights_kernel",
        "batch_norm_relu_backward_reduce_kernel",
        "batch_norm_relu_backward_apply_kernel",
        "conv_train_kernel",
        "conv_wgrad_kernel",
        "avg_pool_backward_kernel",
    ]
    # What a head reads and writes of its input: once each way.
    first, last = launches[0]["touched"], launches[-1]["touched"]
    assert [part["read"] for part in first if part["operand"] == "x"] == [2 * x.numel()]
    assert [part["written"] for part in last if part["operand"] == "dx"] == [2 * x.numel()]


@each_device
@each_head
def test_deterministic_algorithms_need_no_detour(device, head):
    """And results repeat bit for bit."""
    module = make_head(head).float()
    x = randn(2, 24, 13, 15)
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(2):
            copied = copy.deepcopy(module).to(torch_device(device))
            with kernels_on(device, seed=seed) as launches:
                runs.append(step(copied, x.to(torch_device(device))))
            if device == "emulator":
                counts = Counter(launch["op"] for launch in launches)
                assert counts["aux_pool_forward"] == counts["aux_pool_backward"] == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(runs[1][name], values) for name, values in runs[0].items())


@needs_emulator
@each_head
def test_a_head_compiled_with_fullgraph(head):
    module = make_head(head).float()
    x = randn(2, 24, 14, 14)
    compiled = copy.deepcopy(module)
    compiled.compile(backend="aot_eager", fullgraph=True)
    with emulated() as launches:
        ours = step(compiled, x)
    torch.compiler.reset()
    assert {"aux_pool_forward", "aux_pool_backward"} <= {launch["op"] for launch in launches}
    with emulated():
        plain = step(module, x)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# The network of 2014


class StepwiseNorm(nn.LocalResponseNorm):
    """torch has no kernel for 16 bits on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return eager_lrn(x, self.size, self.alpha, self.beta, self.k)


def bvlc_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    outputs = model(x)
    sum(output.square().mean() for output in outputs).backward()
    results = dict(zip(outputs._fields, outputs, strict=True))
    results |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in results.items()}


@needs_emulator
@each_dtype
def test_bvlc_training_step(dtype):
    torch.manual_seed(0)
    exact = bvlc_googlenet(10, dropout=0.0, dropout_aux=0.0).double()
    ours, eager = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(dtype)
    for name in ("lrn1", "lrn2"):
        norm = getattr(eager, name)
        setattr(eager, name, StepwiseNorm(norm.size, norm.alpha, norm.beta, norm.k))
    x = randn(2, 3, 64, 64, dtype=dtype)
    with emulated() as launches:
        found = bvlc_step(ours, x)
    expected = bvlc_step(eager, x), bvlc_step(exact, x.double())
    assert_network_as_good_as_eager(found, *expected)
    counts = Counter(launch["op"] for launch in launches)
    assert counts["lrn"] == counts["lrn_backward"] == 2
    assert counts["aux_pool_forward"] == counts["aux_pool_backward"] == 2
