"""Batch norms that are not the default, in training on the CUDA kernels: without running
statistics, with cumulative averages, frozen."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import (
    BLOCK_NOISE_FLOOR,
    assert_all_as_good_as_eager,
    assert_network_as_good_as_eager,
)
from fast_path import bn_tensors, randn
from kernel_devices import (
    each_device,
    exact_products,
    kernel_ops,
    kernels_on,
    needs_emulator,
    torch_device,
)
from test_training_kernels import judge
from torch import Tensor, nn

from inception_ext import functional, reference
from inception_ext.modules import BasicConv2d, Inception, conv_chain
from inception_ext.testing import emulated

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])

# How each batch norm is made; the last is changed afterwards.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no statistics": {"track_running_stats": False},
    "cumulative": {"momentum": None},
    "neither": {"momentum": None, "track_running_stats": False},
    "tracking turned off": {},
}
OTHERS = [variant for variant in VARIANTS if variant != "default"]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


class Chain(nn.Module):
    """Two convolutions and a pool, as the stem has them."""

    def __init__(self, conv_block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([conv_block(16, 16, kernel_size=1)])
        self.blocks.append(conv_block(16, 24, kernel_size=3, padding=1))
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return conv_chain(list(self.blocks), self.pool, x)


MODULES: dict[str, Callable[[Callable[..., nn.Module]], nn.Module]] = {
    "conv": lambda conv_block: conv_block(16, 24, kernel_size=3, padding=1),
    "chain": Chain,
    "inception": lambda conv_block: Inception(16, 8, 8, 12, 8, 8, 8, conv_block),
}
OPS = {"conv": "conv_chain", "chain": "conv_chain", "inception": "inception"}


def batch_norms(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]


def make(kind: str, variant: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module in ``dtype`` with float32 batch norms, whose channels are active or are not,
    wherever one looks: rounding errors decide no ReLU."""
    torch.manual_seed(0)

    def conv_block(c: int, k: int, **kwargs: Any) -> nn.Module:
        block = BasicConv2d(c, k, **kwargs)
        block.bn = nn.BatchNorm2d(k, eps=1e-3, **VARIANTS[variant])
        return block

    module = MODULES[kind](conv_block).to(dtype)
    for i, bn in enumerate(batch_norms(module)):
        tensors = bn_tensors(bn.num_features)
        bn.float()
        with torch.no_grad():
            bn.weight.copy_(tensors["weight"])
            bn.bias.copy_(torch.where(torch.arange(bn.num_features) % 3 == i % 3, -4.0, 4.0))
            if bn.running_mean is not None:
                bn.running_mean.copy_(tensors["running_mean"])
                bn.running_var.copy_(tensors["running_var"])
        if variant == "tracking turned off":
            bn.track_running_stats = False
    return module


def results_of(
    module: nn.Module, batches: list[Tensor], images: slice = slice(None)
) -> dict[str, Tensor]:
    """Outputs and gradients of several batches, or of some images of each; then the buffers."""
    results: dict[str, list[Tensor]] = {}
    for seed, x in enumerate(batches):
        leaf = x[images].detach().requires_grad_()
        module.zero_grad()
        y = module(leaf)
        y.backward(randn(len(x), *y.shape[1:], seed=seed).to(y)[images])
        results.setdefault("y", []).append(y.detach())
        results.setdefault("dx", []).append(leaf.grad)
        gradients: dict[str, list[Tensor]] = {}
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:  # batch norms' together: single ones may be tiny
                key = name if "conv" in name else name.rpartition(".")[2]
                gradients.setdefault(f"d{key}", []).append(parameter.grad)
        for name, parts in gradients.items():
            results.setdefault(name, []).append(torch.cat([part.flatten() for part in parts]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        parts = [b.flatten() for k, b in module.named_buffers() if k.endswith(name)]
        if parts:
            results[name] = parts
    return {name: torch.cat(parts) for name, parts in results.items()}


def run_three(
    module: nn.Module, batches: list[Tensor], device: str = "emulator"
) -> tuple[tuple[dict[str, Tensor], ...], list[dict[str, Any]]]:
    """Ours, eager's and float64's results, and the launches."""
    ours, eager, exact = (copy.deepcopy(module) for _ in range(3))
    exact.double()
    with kernels_on(device) as launches:
        on_device = [x.to(torch_device(device)) for x in batches]
        results = results_of(ours.to(torch_device(device)), on_device)
    with functional.use_kernels(False):
        return (
            results,
            results_of(eager, batches),
            results_of(exact, [x.double() for x in batches]),
        ), launches


@each_device
@each_dtype
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", OTHERS)
@pytest.mark.parametrize("kind", MODULES)
def test_variant(device, kind, variant, training, dtype):
    runs = []
    for seed in (100, 200):
        module = make(kind, variant, dtype).train(training)
        batches = [randn(3, 16, 6, 5, seed=seed + i).to(dtype) for i in range(2)]
        run, launches = run_three(module, batches, device)
        if device == "emulator":
            ops = {launch["op"] for launch in launches}
            assert ops == {f"{OPS[kind]}_forward", f"{OPS[kind]}_backward"}
        runs.append(run)
    judge(runs, dtype)


@needs_emulator
@pytest.mark.parametrize("variant", OTHERS)
def test_a_module_has_as_many_launches_as_ever(variant):
    module = make("inception", variant).to(memory_format=torch.channels_last)
    with emulated() as launches:
        results_of(module, [randn(2, 16, 6, 6)])
    ops = [launch["op"] for launch in launches]
    assert ops == ["inception_forward"] * 5 + ["inception_backward"] * 9


@needs_emulator
@pytest.mark.parametrize("variant", ["no statistics", "cumulative"])
def test_a_network(make_pair, variant):
    """Two steps, then evaluation."""
    ours, eager = make_pair()
    for model in (ours, eager):
        for bn in batch_norms(model):
            bn.momentum = VARIANTS[variant].get("momentum", bn.momentum)
            if not VARIANTS[variant].get("track_running_stats", True):
                bn.track_running_stats = False
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    setattr(bn, name, None)
            bn.track_running_stats &= variant != "tracking turned off"
    exact = copy.deepcopy(eager).double()

    def results(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        outputs = {}
        model.train()
        for step in range(2):
            model.zero_grad()
            images = randn(2, 3, 64, 64, seed=step).to(dtype)
            named = model(images)
            sum(output.square().mean() for output in named).backward()
            outputs |= {f"{step} {k}": v for k, v in named._asdict().items()}
        outputs |= {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        model.eval()
        with torch.no_grad():
            outputs["eval"] = model(randn(2, 3, 64, 64, seed=2).to(dtype))
        return {k: v.detach() for k, v in {**outputs, **dict(model.named_buffers())}.items()}

    with emulated(checks=False) as launches:
        kernels = results(ours, torch.float32)
    assert {launch["op"] for launch in launches} >= {"inception_backward", "conv_chain_backward"}
    expected = results(eager, torch.float32), results(exact, torch.float64)
    assert_network_as_good_as_eager(kernels, *expected)


@needs_emulator
@pytest.mark.parametrize("variant", ["no statistics", "neither"])
def test_one_value_is_an_error_in_evaluation_too(variant):
    module = make("conv", variant).eval()
    with emulated() as launches, pytest.raises(ValueError, match="more than 1 value per channel"):
        module(randn(1, 16, 1, 1))
    assert launches == []


@needs_emulator
def test_counts_that_differ():
    """Cumulative averages of other lengths have other momenta: PyTorch's path, the same results."""
    module = make("inception", "cumulative")
    module.branch3[1].bn.num_batches_tracked += 2
    run, launches = run_three(module, [randn(3, 16, 7, 5, seed=i) for i in range(2)])
    assert not any(launch["op"].startswith("inception") for launch in launches)
    judge([run], torch.float32)
    assert run[0]["num_batches_tracked"].tolist() == [2, 2, 2, 2, 4, 2]


@needs_emulator
@pytest.mark.parametrize("variant", ["no statistics", "cumulative"])
def test_compiled(variant):
    """Without statistics compiles as one op; a host that counts batches does not."""
    module, eager = make("inception", variant), make("inception", variant)
    x = randn(2, 16, 6, 5)
    with emulated() as launches:
        fullgraph = variant == "no statistics"
        y = torch.compile(module, fullgraph=fullgraph, backend="aot_eager")(x)
        y.square().sum().backward()
    exact = make("inception", variant).double()
    with functional.use_kernels(False):
        expected = eager(x)
        expected.square().sum().backward()
        reference = exact(x.double())
    fused = "inception_forward" in {launch["op"] for launch in launches}
    assert fused == (variant == "no statistics")
    ours, theirs, right = (
        {"y": y, **dict(m.named_buffers())}
        for m, y in ((module, y), (eager, expected), (exact, reference))
    )
    assert_all_as_good_as_eager(ours, theirs, right, BLOCK_NOISE_FLOOR)
    torch.compiler.reset()


@needs_emulator
def test_opcheck_without_statistics():
    ops = kernel_ops("emulator")
    x, (weight, bias, *_) = randn(2, 8, 3, 3), bn_tensors(8).values()
    torch.library.opcheck(
        ops.batch_norm_relu_forward.default, (x, weight, bias, None, None, True, 0.1, 1e-3)
    )
    weights = [randn(8, 8, size, size) for size in (1, 1, 3, 1, 3, 1)]
    vectors = [[weight.clone() for _ in range(6)], [bias.clone() for _ in range(6)]]
    arguments = (x, weights, *vectors, [], [], True, 0.1, 1e-3, True)
    torch.library.opcheck(ops.inception_forward.default, arguments)
    arguments = (x, weights[:1], [weight], [bias], [], [], [1], [0], [], True, 0.1, 1e-3, True)
    torch.library.opcheck(ops.conv_chain_forward.default, arguments)


@needs_emulator
def test_evaluation_needs_statistics():
    ops = kernel_ops("emulator")
    x, (weight, bias, mean, var) = randn(2, 8, 3, 3), bn_tensors(8).values()
    settings = (False, 0.1, 1e-3)
    for running, text in (
        ((None, var), "running_mean: expected a tensor in evaluation mode, got None"),
        ((mean, None), "running_var: expected a tensor in evaluation mode, got None"),
    ):
        with pytest.raises(RuntimeError, match=f"batch_norm_relu_forward: {text}"):
            ops.batch_norm_relu_forward(x, weight, bias, *running, *settings)
    chain = (x, [randn(8, 8, 1, 1)], [weight], [bias])
    for training, count, text in ((False, 0, "1 tensors, got 0"), (True, 2, "1 tensors or none")):
        with pytest.raises(
            RuntimeError, match=f"conv_chain_forward: running_means: expected {text}"
        ):
            ops.conv_chain_forward(
                *chain, [mean] * count, [var], [1], [0], [], training, 0.1, 1e-3, False
            )


# Frozen batch norms: constants, whose weights may be trained or not.


@each_device
@each_dtype
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "all frozen"])
@pytest.mark.parametrize("kind", MODULES)
def test_frozen(device, kind, affine, dtype):
    runs = []
    for seed in (100, 200):
        module = make(kind, "default", dtype).train()
        for bn in batch_norms(module):
            bn.eval().requires_grad_(affine)
        run, launches = run_three(module, [randn(3, 16, 7, 5, seed=seed).to(dtype)], device)
        assert ("dbias" in run[0]) == affine and run[0].keys() == run[1].keys()
        assert torch.equal(run[0]["running_mean"].cpu(), run[1]["running_mean"])
        reductions = sum("backward_reduce" in launch["kernel"] for launch in launches)
        if device == "emulator":
            assert reductions == ({"conv": 1}.get(kind, 2) if affine else 0)
        runs.append(run)
    judge(runs, dtype)


@needs_emulator
def test_frozen_op_alone():
    tensors, grad = bn_tensors(8), randn(2, 8, 5, 5, seed=1)
    results = []
    for library in (functional, reference):
        x = randn(2, 8, 5, 5).requires_grad_()
        with emulated() as launches:
            y = library.batch_norm_relu(x, *tensors.values(), False, 0.1, 1e-3)
            y.backward(grad)
        results.append((y.detach(), x.grad))
        assert not any("reduce" in launch["kernel"] for launch in launches)
    torch.testing.assert_close(*results)
