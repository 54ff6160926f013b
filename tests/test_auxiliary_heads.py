"""The auxiliary heads, and the network of 2014, in training on the CUDA kernels."""

import copy
import functools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from closeness import (
    BLOCK_NOISE_FLOOR,
    assert_all_as_good_as_eager,
    assert_as_good_as_eager,
    assert_network_as_good_as_eager,
)
from fast_path import randn
from kernel_devices import each_device, exact_products, kernels_on, needs_emulator, torch_device
from ops_cases import as_leaf
from test_avg_pool_and_lrn import eager_lrn
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from training_cases import assert_equal

from inception_ext import BasicConv2d, Inception, InceptionAux
from inception_ext._conv_relu import conv_relu_chain
from inception_ext.bvlc import BVLCInceptionAux, ConvReLU, bvlc_googlenet
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
    with emulated(counting=False):
        assert_equal(ours, step(module, x))


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
    with exact_products(), emulated(checks=False) as launches:
        found = bvlc_step(ours, x)
    expected = bvlc_step(eager, x), bvlc_step(exact, x.double())
    assert_network_as_good_as_eager(found, *expected)
    # Launches: 3x3 filters of another layout than channels_last are packed first.
    assert Counter(launch["op"] for launch in launches) == {
        "conv_chain_forward": 4 + 6 + 2 * 3,  # conv1 and pool; conv2 and conv3; two heads
        "inception_forward": 9 * 6,
        "max_pool_forward": 3,
        "lrn": 2,
        "aux_pool_forward": 2,
        "aux_pool_backward": 2,
        "lrn_backward": 2,
        "max_pool_backward": 3,
        "inception_backward": 9 * 9,
        "conv_chain_backward": 4 + 9 + 2 * 5,  # the image needs no gradient
    }


# Its blocks


def conv_relu_module(branch3_kernel_size: int = 5) -> Inception:
    torch.manual_seed(0)
    make = functools.partial(Inception, branch3_kernel_size=branch3_kernel_size)
    return make(16, 8, 8, 12, 4, 8, 8, conv_block=ConvReLU)


def on_kernels(module: nn.Module, x: Tensor) -> set[str]:
    """The ops that a step launches; its results are held to those without kernels."""
    exact = copy.deepcopy(module).double()
    with emulated() as launches:
        ours = step(module, x)
    with use_kernels(False):
        assert_all_as_good_as_eager(
            ours, step(module, x), step(exact, x.double()), BLOCK_NOISE_FLOOR
        )
    return {launch["op"] for launch in launches}


BLOCK_OPS = {"inception_forward", "inception_backward"}
CHAIN_OPS = {"conv_chain_forward", "conv_chain_backward"}


@needs_emulator
@pytest.mark.parametrize("branch3", [3, 5])
@pytest.mark.parametrize("shape", [(2, 16, 7, 6), (1, 16, 1, 1)], ids=str)
def test_an_inception_module_of_the_paper(shape, branch3):
    module = conv_relu_module(branch3)
    assert on_kernels(module, randn(*shape)) == BLOCK_OPS
    assert step(module, randn(*shape))["y"].shape == (shape[0], 36, *shape[2:])  # on the CPU


@needs_emulator
@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_of_the_paper(stride):
    """Whose input needs a gradient: with a stride there is no kernel."""
    block = ConvReLU(16, 24, kernel_size=3, padding=1, stride=stride)
    assert on_kernels(block, randn(2, 16, 7, 6)) == (CHAIN_OPS if stride == 1 else set())


@needs_emulator
@pytest.mark.parametrize("pool", [nn.Identity(), nn.MaxPool2d(2, 1), nn.AvgPool2d(3)], ids=str)
def test_other_pools_behind_a_chain(pool):
    x = randn(2, 16, 9, 8)
    blocks = [ConvReLU(16, 8, kernel_size=1)]
    with emulated() as launches:
        y = conv_relu_chain(blocks, pool, x)
    exact = pool(copy.deepcopy(blocks[0]).double()(x.double()))
    assert_as_good_as_eager(y, pool(blocks[0](x)), exact, BLOCK_NOISE_FLOOR)
    assert {launch["op"] for launch in launches} == {"conv_chain_forward"}


CHANGES = {
    "hook on a block": lambda m: m.branch2[0].register_forward_hook(lambda *_: None),
    "hook on a convolution": lambda m: m.branch2[0].conv.register_forward_hook(lambda *_: None),
    "hook on the pool": lambda m: m.branch4[0].register_forward_hook(lambda *_: None),
    "no bias": lambda m: setattr(m.branch1, "conv", nn.Conv2d(16, 8, 1, bias=False)),
    "dilation": lambda m: setattr(m.branch2[1], "conv", nn.Conv2d(8, 12, 3, padding=2, dilation=2)),
    "replaced": lambda m: setattr(m, "branch1", nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())),
    "mixed": lambda m: setattr(m, "branch1", BasicConv2d(16, 8, kernel_size=1)),
    "parametrized": lambda m: parametrizations.weight_norm(m.branch3[0].conv),
    "patched": lambda m: setattr(m.branch1, "forward", lambda x: 2 * m.branch1.conv(x)),
}


@needs_emulator
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_of_the_paper_do_not_run_as_one(change):
    module = conv_relu_module()
    assert "fused on CUDA" in repr(module)
    CHANGES[change](module)
    assert "not fused: " in repr(module)
    state = copy.deepcopy(module.state_dict())
    x = randn(2, 16, 7, 6)
    with emulated() as launches:
        ours = step(module, x)
    assert not BLOCK_OPS & {launch["op"] for launch in launches}
    module.load_state_dict(state)
    with use_kernels(False):
        plain = step(module, x)
    twin = conv_relu_module()
    CHANGES[change](twin)
    twin.load_state_dict(state)
    exact = step(twin.double(), x.double())
    assert_all_as_good_as_eager(ours, plain, exact, BLOCK_NOISE_FLOOR)


@needs_emulator
def test_the_paper_under_autocast():
    """With float32 master weights, in the dtype that autocast gives."""
    module = conv_relu_module()
    x = randn(2, 16, 7, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        with emulated() as launches:
            y = module(x)
        with use_kernels(False):
            expected = module(x)
        with emulated() as of_float32:  # its blocks cast one by one
            assert module(x.float()).dtype == expected.dtype
        with emulated() as of_images:
            y1 = conv_relu_chain([module.branch1], None, x.float())
    with emulated(counting=False):
        y.sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16
    assert_as_good_as_eager(y, expected, copy.deepcopy(module).double()(x.double()))
    assert {launch["op"] for launch in launches} == {"inception_forward"}
    assert "inception_forward" not in {launch["op"] for launch in of_float32}
    assert y1.dtype == torch.bfloat16
    assert {launch["op"] for launch in of_images} == {"conv_chain_forward"}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@needs_emulator
def test_double_backward_through_the_paper():

    def penalty(dtype: torch.dtype = torch.float32) -> Tensor:
        module = conv_relu_module().to(dtype)
        x = randn(2, 16, 5, 4, dtype=dtype).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with emulated(counting=False):
        ours = penalty()
    with use_kernels(False):
        eager = penalty()
    assert_as_good_as_eager(ours, eager, penalty(torch.float64), BLOCK_NOISE_FLOOR)


@needs_emulator
@pytest.mark.parametrize("kind", ["module", "block"])
def test_the_paper_compiled_with_fullgraph(kind):
    module = conv_relu_module() if kind == "module" else ConvReLU(16, 8, kernel_size=1)
    compiled = copy.deepcopy(module)
    compiled.compile(backend="aot_eager", fullgraph=True)
    x = randn(2, 16, 7, 6)
    with emulated() as launches:
        ours = step(compiled, x)
    torch.compiler.reset()
    assert {launch["op"] for launch in launches} == (BLOCK_OPS if kind == "module" else CHAIN_OPS)
    with emulated(counting=False):
        assert_equal(ours, step(module, x))


@needs_emulator
def test_the_paper_without_gradients_and_with_frozen_ones():
    module = conv_relu_module()
    x = randn(2, 16, 7, 6)
    with emulated() as launches:
        everything = step(module, x)
        with torch.no_grad():
            assert torch.equal(module(x), everything["y"])
        module.branch1.conv.bias.requires_grad_(False)
        module.branch2[1].conv.weight.requires_grad_(False)
        some = step(module, x)
    missing = {"branch1.conv.bias.grad", "branch2.1.conv.weight.grad"}
    assert everything.keys() - some.keys() == missing
    assert all(torch.equal(everything[name], values) for name, values in some.items())
    assert {launch["op"] for launch in launches} == BLOCK_OPS
