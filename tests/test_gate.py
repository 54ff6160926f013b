"""The compiled ops run where they give what plain PyTorch gives, and nowhere else.

For each condition: which ops were called, and results, gradients and buffers held to the plain path
(``use_kernels(False)``) with float64 as the judge.
"""

import copy
import gc
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from closeness import BLOCK_NOISE_FLOOR, assert_all_as_good_as_eager
from fast_path import CalledOps, randn, strides
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import inception_ext
from inception_ext import _library, functional, reference
from inception_ext.modules import BasicConv2d, Inception

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


@pytest.fixture
def block() -> Inception:
    return make_block()


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


# The plain case


@pytest.mark.parametrize("branch3", [3, 5])
def test_the_plain_case_is_fused(branch3):
    block = make_block(branch3_kernel_size=branch3)
    check(block, kernels=True)
    check(block.to(memory_format=torch.channels_last), kernels=True)
    assert repr(block).splitlines()[1].strip() == "fused"


def test_basic_conv_runs_batch_norm_relu():
    conv = BasicConv2d(16, 8, kernel_size=3, stride=2, padding=1)
    assert check(conv) == ["batch_norm_relu_forward", "batch_norm_relu_backward"] * 2


@each_mode
def test_the_network(training):
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(10, init_weights=False).train(training)
    with CalledOps() as called:
        outputs = model(torch.randn(2, 3, 64, 64))
        (outputs.logits if training else outputs).sum().backward()
    expected = {
        "conv3x3_forward": 1,
        "conv3x3_backward": 1,
        "inception_forward": 9,
        "inception_backward": 9,
        "max_pool_forward": 4,
        "max_pool_backward": 4,
        "batch_norm_relu_forward": 5 if training else 3,  # those of the heads too
        "batch_norm_relu_backward": 3,  # of the main classifier's loss
    }
    assert {name: called.names.count(name) for name in called.names} == expected


def test_no_grad_and_inference_mode(block):
    block.eval()
    with functional.use_kernels(False):
        expected = block(X)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), CalledOps() as called:
            torch.testing.assert_close(block(X), expected)
        assert called.names == ["inception_forward"]


def test_training_in_inference_mode():
    with torch.inference_mode():
        block, plain = make_block(), make_block()  # whose buffers have no version
        y = block(X)
        with functional.use_kernels(False):
            torch.testing.assert_close(y, plain(X))
        torch.testing.assert_close(dict(block.named_buffers()), dict(plain.named_buffers()))


# Hooks

HOOKED = ("branch1", "branch2", "branch2.1", "branch1.conv", "branch3.0.bn", "branch4.0")
HOOKS: dict[str, Callable] = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "full_backward": nn.Module.register_full_backward_hook,
    "full_backward_pre": nn.Module.register_full_backward_pre_hook,
}


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_child(block, kind, name):
    calls = []
    handle = HOOKS[kind](block.get_submodule(name), lambda *_: calls.append(name))
    check_not_fused(block)
    assert len(calls) == 6  # ours, plain, float64; train and eval
    assert "hook on" in repr(block)
    handle.remove()
    check(block, kernels=True)
    assert len(calls) == 6


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_the_block_itself(block, kind):
    calls = []
    HOOKS[kind](block, lambda *_: calls.append(kind))
    check(block, kernels=True)
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["branch2.1", "branch3.0.bn", "branch4.0"])
def test_a_hook_that_changes_the_output(block, name):
    block.get_submodule(name).register_forward_hook(lambda _, __, y: y * 2 + 1)
    check_not_fused(block)


@pytest.mark.parametrize(
    "register",
    [
        global_hooks.register_module_forward_hook,
        global_hooks.register_module_forward_pre_hook,
        global_hooks.register_module_full_backward_hook,
        global_hooks.register_module_full_backward_pre_hook,
    ],
    ids=lambda register: register.__name__,
)
def test_a_hook_on_all_modules(block, register):
    seen = []
    handle = register(lambda module, *_: seen.append(type(module)))
    try:
        check(block, kernels=False)
        seen.clear()
        results_of(block, X)
    finally:
        handle.remove()
    assert seen.count(nn.BatchNorm2d) == seen.count(nn.Conv2d) == seen.count(BasicConv2d) == 6
    assert seen.count(nn.MaxPool2d) == 1
    check(block, kernels=True)


def test_a_hook_on_a_pool_of_the_network():
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(10, aux_logits=False, init_weights=False).eval()
    model.maxpool2.register_forward_hook(lambda _, __, y: y * 0)
    with CalledOps() as called, torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, 64, 64))
    assert called.names.count("max_pool_forward") == 3
    assert torch.equal(features, model.forward_features(torch.zeros(1, 3, 64, 64)))


# Rebuilt blocks


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class OwnForward(BasicConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, *args):
        return super()._conv_forward(*args) * 2


class OwnBranches(Inception):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [2 * branch for branch in super()._forward(x)]


class SubTensor(Tensor):
    pass


def replace(name: str, make: Callable[[], nn.Module]) -> Callable[[Inception], None]:
    def change(block: Inception) -> None:
        torch.manual_seed(3)
        block.set_submodule(name, make())

    return change


def set_attributes(name: str, **values: object) -> Callable[[Inception], None]:
    def change(block: Inception) -> None:
        for key, value in values.items():
            setattr(block.get_submodule(name), key, value)

    return change


def conv(name: str, *args: int, **kwargs: object) -> Callable[[Inception], None]:
    return replace(name, lambda: nn.Conv2d(*args, **{"bias": False, **kwargs}))


def separable(block: Inception) -> None:
    """Two filters whose paddings only fit together."""
    conv("branch2.0.conv", 16, 8, kernel_size=(3, 1), padding=1)(block)
    conv("branch2.1.conv", 8, 12, kernel_size=(1, 3), padding=0)(block)


def share_a_batch_norm(block: Inception) -> None:
    block.branch2[0].bn = block.branch1.bn


REBUILT: dict[str, Callable[[Inception], object]] = {
    "parametrized convolution": lambda b: parametrize.register_parametrization(
        b.branch3[1].conv, "weight", Halved()
    ),
    "parametrized batch norm": lambda b: parametrize.register_parametrization(
        b.branch4[1].bn, "bias", Halved()
    ),
    "weight norm": lambda b: parametrizations.weight_norm(b.branch1.conv),
    "pruned convolution": lambda b: prune.l1_unstructured(b.branch2[1].conv, "weight", 0.5),
    "pruned batch norm": lambda b: prune.l1_unstructured(b.branch2[1].bn, "weight", 0.5),
    "convolution of its own": replace(
        "branch2.1.conv", lambda: OwnConvolution(8, 12, 3, padding=1, bias=False)
    ),
    "forward of its own": replace("branch1", lambda: OwnForward(16, 8, kernel_size=1)),
    "another block": replace("branch1", lambda: nn.Conv2d(16, 8, 1)),
    "another norm": replace("branch2.1.bn", lambda: nn.GroupNorm(2, 12)),
    "no norm": replace("branch2.1.bn", nn.Identity),
    "another pool": replace("branch4.0", lambda: nn.AvgPool2d(3, 1, 1)),
    "a longer branch": lambda b: b.branch3.append(nn.Dropout(0.0)),
    "a pool of another kernel": replace("branch4.0", lambda: nn.MaxPool2d(5, 1, 2)),
    "a dilated pool": replace("branch4.0", lambda: nn.MaxPool2d(2, 1, 1, dilation=2)),
    "bias": conv("branch1.conv", 16, 8, 1, bias=True),
    "dilation": conv("branch2.1.conv", 8, 12, 3, padding=2, dilation=2),
    "groups": conv("branch2.0.conv", 16, 8, 1, groups=2),
    "padding_mode": conv("branch2.1.conv", 8, 12, 3, padding=1, padding_mode="reflect"),
    "padding by name": conv("branch2.1.conv", 8, 12, 3, padding="same"),
    "separable filters": separable,
    "3x3 for 1x1": conv("branch1.conv", 16, 8, 3, padding=1),
    "momentum=None": set_attributes("branch3.1.bn", momentum=None),
    "another momentum": set_attributes("branch3.1.bn", momentum=0.5),
    "another eps": set_attributes("branch1.bn", eps=0.1),
    "track_running_stats=False": replace(
        "branch1.bn", lambda: nn.BatchNorm2d(8, eps=1e-3, track_running_stats=False)
    ),
    "affine=False": replace("branch1.bn", lambda: nn.BatchNorm2d(8, eps=1e-3, affine=False)),
    "no bias": set_attributes("branch1.bn", bias=None),
    "no count of batches": set_attributes("branch1.bn", num_batches_tracked=None),
    "a shared batch norm": share_a_batch_norm,
}


@pytest.mark.parametrize("change", REBUILT)
def test_a_rebuilt_block(change):
    def make() -> Inception:
        block = make_block()
        REBUILT[change](block)
        return block

    check_not_fused(make)


def test_a_rebuilt_block_says_why():
    block = make_block()
    block.branch1.bn.momentum = None
    assert "not fused: batch norms that differ in training, momentum, eps" in repr(block)
    with functional.use_kernels(False):
        assert "not fused: turned off" in repr(block)


def test_one_momentum_for_all_is_fused(block):
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.momentum, bn.eps = 0.7, 0.01
    check(block, kernels=True)


OTHER_KINDS: dict[str, Callable[[nn.BatchNorm2d], nn.BatchNorm2d]] = {
    "momentum=None": lambda bn: set_all(bn, momentum=None),
    "no statistics": lambda bn: nn.BatchNorm2d(
        bn.num_features, eps=1e-3, track_running_stats=False
    ),
    "tracking turned off later": lambda bn: set_all(bn, track_running_stats=False),
    "synchronised, but alone": nn.SyncBatchNorm.convert_sync_batchnorm,
}


def set_all(bn: nn.BatchNorm2d, **values: object) -> nn.BatchNorm2d:
    for key, value in values.items():
        setattr(bn, key, value)
    return bn


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_another_kind_of_batch_norm_for_all_is_fused(block, kind):
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            block.set_submodule(name, OTHER_KINDS[kind](module))
    check(block, kernels=True)


def test_tracking_turned_off_for_one(block):
    """Is the same in evaluation."""
    block.branch1.bn.track_running_stats = False
    assert check(block).count("inception_forward") == 1


def test_branches_of_its_own():
    block = OwnBranches(16, 8, 8, 12, 4, 8, 8)
    check_not_fused(block)
    block = make_block()
    block._forward = lambda x: [branch * 2 for branch in Inception._forward(block, x)]
    with CalledOps() as called:
        y = block(X)
    assert "inception_forward" not in called.names
    torch.testing.assert_close(y, 2 * make_block()(X))


def test_a_patched_forward(block):
    """As tools that trace or checkpoint do it, on the object."""
    block.branch2[0].forward = lambda x: BasicConv2d.forward(block.branch2[0], x) * 2
    block.branch3[0].bn.forward = lambda x: x
    with CalledOps() as called:
        y = block(X)
    assert "inception_forward" not in called.names
    assert called.names.count("batch_norm_relu_forward") == 5
    plain = make_block()
    with functional.use_kernels(False):
        plain.branch2[0].register_forward_hook(lambda _, __, y: y * 2)
        plain.branch3[0].bn.register_forward_hook(lambda _, x, __: x[0])
        torch.testing.assert_close(y, plain(X))


def test_batch_norms_in_different_modes(block):
    block.branch2[1].bn.train = lambda mode: block.branch2[1].bn  # stays in eval mode
    block.branch2[1].bn.training = False
    assert check(block).count("inception_forward") == 1  # where the others are in eval mode too


@each_mode
def test_parameters_of_a_tensor_subclass(block, training):
    block.train(training)
    with functional.use_kernels(False):
        expected = copy.deepcopy(block)(X)
    for name in ("branch2.1.conv", "branch2.1.bn"):
        module = block.get_submodule(name)
        module.weight = nn.Parameter(module.weight.detach().as_subclass(SubTensor))
    with CalledOps() as called:
        y = block(X)
    assert "inception_forward" not in called.names
    torch.testing.assert_close(y, expected, check_dtype=False)


# Inputs


def test_a_tensor_subclass(block):
    with CalledOps() as called:
        y = block(X.as_subclass(SubTensor))
        functional.max_pool(X.as_subclass(SubTensor), 3, 2)
    assert called.names == [] and type(y) is SubTensor
    with functional.use_kernels(False):
        torch.testing.assert_close(y.as_subclass(Tensor), make_block()(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_dtypes_without_kernels(block, dtype):
    block.to(dtype)
    plain = copy.deepcopy(block)
    with CalledOps() as called:
        ours = results_of(block, X.to(dtype))
        functional.max_pool(X.to(dtype), 3, 2)
    assert called.names == []
    with functional.use_kernels(False):
        expected = results_of(plain, X.to(dtype))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_bfloat16_has_kernels(block):
    with CalledOps() as called:
        assert block.bfloat16()(X.bfloat16()).dtype == torch.bfloat16
    assert called.names == ["inception_forward"]


def test_another_device(block):
    with CalledOps() as called:
        y = copy.deepcopy(block).to("meta")(X.to("meta"))
        pooled = functional.max_pool(X.to("meta"), 3, 2)
    assert called.names == [] and y.is_meta and pooled.is_meta
    assert y.shape == block(X).shape


@each_mode
def test_windows_without_kernels(training):
    x = randn(2, 3, 40, 40)
    with CalledOps() as called:
        assert torch.equal(functional.max_pool(x, 17, 2), F.max_pool2d(x, 17, 2))  # 289 elements
    assert called.names == []


# Tracing


def test_fx(block):
    block.eval()
    traced = torch.fx.symbolic_trace(block)
    targets = {getattr(node.target, "__name__", node.target) for node in traced.graph.nodes}
    assert {"branch1.conv", "branch2.1.bn", "relu", "cat"} <= targets
    with CalledOps() as called:
        torch.testing.assert_close(traced(X), block(X))
    assert called.names == ["inception_forward"]  # the block's, not the graph's


@each_mode
def test_jit_script(block, training):
    block.train(training)
    scripted = torch.jit.script(copy.deepcopy(block))
    with CalledOps() as called:
        y = scripted(X)
    assert called.names == []
    torch.testing.assert_close(y, block(X))


def test_jit_trace(block):
    block.eval()
    traced = torch.jit.trace(block, X)
    assert "inception_ext::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), block(X))


def test_export(block):
    program = torch.export.export(block.eval(), (X,))
    assert "inception_ext." not in str(program.graph)
    torch.testing.assert_close(program.module()(X), block(X))


# Derivatives of other kinds


def without_kernels(function: Callable[[], object]) -> object:
    with functional.use_kernels(False):
        return function()


def assert_plain(function: Callable[[], object]) -> None:
    with CalledOps() as called:
        ours = function()
    assert called.names == []
    torch.testing.assert_close(ours, without_kernels(function))


def test_functional_call_is_fused(block):
    """Without a transform, other parameters are nothing special."""
    parameters = {k: (p * 1.5).detach().requires_grad_() for k, p in block.named_parameters()}
    with CalledOps() as called:
        y = functional_call(block, parameters, (X,))
        y.sum().backward()
    assert called.names == FUSED
    assert all(p.grad is not None for p in parameters.values())
    expected = without_kernels(lambda: functional_call(make_block(), parameters, (X,)))
    torch.testing.assert_close(y, expected)


def test_vmap(block):
    block.eval()
    assert_plain(lambda: vmap(block)(X.expand(2, *X.shape)))
    assert_plain(lambda: vmap(lambda x: functional.max_pool(x, 3, 2))(X[None]))


def test_vmap_over_parameters(block):
    block.eval()
    parameters = {k: torch.stack([p, 2 * p]).detach() for k, p in block.named_parameters()}
    assert_plain(lambda: vmap(lambda p: functional_call(block, p, (X,)))(parameters))


def test_grad_and_per_sample_gradients(block):
    block.eval()
    parameters = {k: p.detach() for k, p in block.named_parameters()}

    def loss(parameters, x):
        return functional_call(block, parameters, (x[None],)).square().sum()

    assert_plain(lambda: grad(loss)(parameters, X[0]))
    assert_plain(lambda: vmap(grad(loss), (None, 0))(parameters, X))
    assert_plain(lambda: torch.func.hessian(lambda x: block(x).sum())(X[:1, :, :2, :2]))


def test_jvp(block):
    block.eval()
    assert_plain(lambda: jvp(block, (X,), (torch.ones_like(X),)))


@pytest.mark.parametrize("dual", ["input", "weight"])
def test_forward_mode(block, dual):
    block.eval()

    def tangent():
        with forward_ad.dual_level():
            x, weight = X, block.branch1.conv.weight.detach()
            if dual == "input":
                x = forward_ad.make_dual(x, torch.ones_like(x))
            else:
                weight = forward_ad.make_dual(weight, torch.ones_like(weight))
            y = functional_call(block, {"branch1.conv.weight": weight}, (x,))
            return forward_ad.unpack_dual(y).tangent

    assert_plain(tangent)
    assert tangent().abs().max() > 0


@each_mode
def test_create_graph(block, training):
    def penalty():
        module = make_block().train(training)
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    with CalledOps() as called:
        ours = penalty()
    assert called.names == FUSED  # the backward of the penalty alone, which nobody differentiates
    torch.testing.assert_close(ours, without_kernels(penalty), rtol=1e-3, atol=1e-3)


def test_a_network_that_makes_its_own_weights(block):
    """Weights computed from the input, under create_graph."""

    def gradient():
        x = X.clone().requires_grad_()
        scale = x.mean()
        parameters = {k: p.detach() * (1 + scale) for k, p in block.eval().named_parameters()}
        y = functional_call(block, parameters, (x,))
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].detach()

    with CalledOps() as called:
        ours = gradient()
    assert called.names == ["inception_forward"]
    torch.testing.assert_close(ours, without_kernels(gradient), rtol=1e-4, atol=1e-4)


BATCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "inception, train": lambda x: make_block()(x),
    "inception, eval": lambda x: make_block().eval()(x),
    "batch_norm_relu, train": lambda x: make_block().branch1(x),
    "batch_norm_relu, eval": lambda x: make_block().eval().branch1(x),
    "max_pool": lambda x: functional.max_pool(x, 3, 2, 1, True),
}


@pytest.mark.filterwarnings("error:There is a performance drop")  # of ops without batching rules
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap", "jacobian"])
@pytest.mark.parametrize("name", BATCHED)
def test_batched_gradients(name, how):
    """Several backward passes over one forward pass at once."""
    function = BATCHED[name]

    def gradients() -> Tensor:
        x = X.clone().requires_grad_()
        if how == "jacobian":
            return torch.autograd.functional.jacobian(
                lambda x: function(x).sum((0, 2, 3)), x, vectorize=True
            )
        y = function(x)
        many = randn(3, *y.shape, seed=4)
        if how == "vmap":
            return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(many)
        return torch.autograd.grad(y, x, many, is_grads_batched=True)[0]

    with CalledOps() as called:
        ours = gradients()
    assert called.names == [f"{name.partition(',')[0]}_forward"]
    assert not ours.requires_grad
    torch.testing.assert_close(ours, without_kernels(gradients), rtol=1e-4, atol=1e-4)


# torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recording_backend(graphs: list[list[str]]) -> Callable:
    """A backend that notes the compiled ops of each graph, forward and backward."""

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        targets = [target for node in graph.graph.nodes for target in (node.target, *node.args)]
        names = [t.name() for t in targets if isinstance(t, torch._ops.OpOverload)]
        graphs.append([n.removeprefix("inception_ext::") for n in names if "inception_ext" in n])
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=record, bw_compiler=record)


@each_mode
def test_compile(block, training, fresh_dynamo):
    block.train(training)
    eager = copy.deepcopy(block)
    graphs: list[list[str]] = []
    block.compile(backend=recording_backend(graphs), fullgraph=True)
    for _ in range(2):  # the second time with what the first has left in the buffers
        torch.testing.assert_close(results_of(block, X), results_of(eager, X))
    assert graphs == [[name] for name in FUSED]


@each_mode
def test_compile_the_other_ops(training, fresh_dynamo):
    torch.manual_seed(0)
    eager = nn.Sequential(BasicConv2d(16, 8, kernel_size=1), BasicConv2d(8, 8, kernel_size=3))
    eager.train(training)
    compiled = copy.deepcopy(eager)
    graphs: list[list[str]] = []

    @torch.compile(backend=recording_backend(graphs), fullgraph=True)
    def run(x):
        return functional.max_pool(compiled(x), 2, 2)

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    run(x).square().sum().backward()
    functional.max_pool(eager(y), 2, 2).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    ops = [*["batch_norm_relu"] * 2, "max_pool"]
    assert graphs[0] == [f"{op}_forward" for op in ops]
    assert graphs[1] == [f"{op}_backward" for op in reversed(ops)]


def test_compile_for_any_batch(block, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block.eval(), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for n, h, w in ((2, 7, 6), (3, 9, 8), (5, 4, 11)):
        x = randn(n, 16, h, w)
        torch.testing.assert_close(compiled(x), block(x))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]  # compiled once


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_compile_within_functorch(block, transform, fresh_dynamo):
    block.eval()
    functions = {
        "vmap": lambda x: vmap(lambda image: block(image))(x[None]),
        "grad": lambda x: grad(lambda image: block(image).square().sum())(x),
    }
    function = functions[transform]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), function(X))
    plain = torch.compile(lambda x: block(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(plain(X), block(X))


def test_compile_notices_the_switch(block, fresh_dynamo):
    block.eval()
    graphs: list[list[str]] = []
    compiled = torch.compile(block, backend=recording_backend(graphs), fullgraph=True)
    with torch.no_grad():
        compiled(X)
        with functional.use_kernels(False):
            compiled(X)
    assert graphs == [["inception_forward"], []]


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_inductor(block, memory_format, fresh_dynamo):
    """Which checks at run time the strides that the fake kernels promised."""
    block.to(memory_format=getattr(torch, memory_format))
    eager = copy.deepcopy(block)
    block.compile(fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(results_of(block, X), results_of(eager, X))


# Bookkeeping of training


def bookkeeping(block: nn.Module) -> dict[str, Tensor]:
    return {k: b.clone() for k, b in block.named_buffers()}


def test_buffers_are_those_of_torchvision(tv_googlenet):
    ours = make_block()
    theirs = tv_googlenet.Inception(16, 8, 8, 12, 4, 8, 8)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        for block in (ours, theirs):
            block(randn(3, 16, 7, 6, seed=step))
        torch.testing.assert_close(bookkeeping(ours), bookkeeping(theirs))
    assert ours.branch2[1].bn.num_batches_tracked == 3
    ours.eval()(X)
    assert ours.branch2[1].bn.num_batches_tracked == 3


@pytest.mark.parametrize("requires_grad", [True, False])
def test_versions_tell_what_was_written(requires_grad):
    """Whoever watches ``_version`` (a frozen engine, autograd) sees running statistics change."""
    for module in (make_block(), BasicConv2d(16, 8, kernel_size=1)):
        module.requires_grad_(requires_grad)
        before = {k: b._version for k, b in module.named_buffers()}
        module(X)
        assert all(b._version > before[k] for k, b in module.named_buffers())
        before = {k: b._version for k, b in module.named_buffers()}
        module.eval()(X)
        assert all(b._version == before[k] for k, b in module.named_buffers())
        before = {k: p._version for k, p in module.named_parameters()}
        module.train()(X)
        assert all(p._version == before[k] for k, p in module.named_parameters())


def test_a_failed_call_leaves_running_statistics_alone(block):
    before = bookkeeping(block)
    with pytest.raises(RuntimeError):
        block(randn(2, 15, 7, 6))
    after = bookkeeping(block)
    assert all(torch.equal(after[k], before[k]) for k in before if "running" in k)


def test_statistics_of_bfloat16_modules(block):
    block.bfloat16()
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    block(X.bfloat16())
    without_kernels(lambda: plain(X.bfloat16()))
    exact(X.bfloat16().double())
    assert_all_as_good_as_eager(*(bookkeeping(module) for module in (block, plain, exact)))


# Training


def test_parameters_without_gradients(block):
    frozen = [name for name, _ in block.named_parameters()][::2]
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name not in frozen)
    check(block, kernels=True)
    block(X).sum().backward()
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == (name in frozen)


def convolution_backwards(block: nn.Module, x: Tensor) -> list[list[bool]]:
    """Of each convolution's backward: whether the gradients of (input, weight) were computed."""
    y = block(x)
    with torch.profiler.profile(record_shapes=True) as profile:
        y.sum().backward()
    events = [e for e in profile.events() if e.name == "aten::convolution_backward"]
    return [event.concrete_inputs[-1][:2] for event in events]


def test_no_gradient_is_computed_that_nobody_wants(block):
    leaf = X.clone().requires_grad_()
    assert convolution_backwards(block, leaf) == [[True, True]] * 4  # the three 1x1 as one
    first_stage, branch2_1, branch3_1, pool = (
        [False, True],
        [True, True],
        [True, True],
        [False, True],
    )
    assert sorted(convolution_backwards(block, X)) == sorted(
        [first_stage, branch2_1, branch3_1, pool]
    )
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    assert convolution_backwards(block, leaf) == [[True, False]] * 4


def test_an_input_without_gradient(block):
    plain = copy.deepcopy(block)
    with CalledOps() as called:
        block(X).square().sum().backward()
    assert called.names == FUSED
    without_kernels(lambda: plain(X).square().sum().backward())
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-3)


def test_frozen_batch_norms_in_training(block):
    block.train()
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            bn.eval()
    plain, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    before = bookkeeping(block)
    with CalledOps() as called:
        ours = results_of(block, X)
    assert called.names == FUSED
    assert_all_as_good_as_eager(
        ours,
        without_kernels(lambda: results_of(plain, X)),
        results_of(exact, X.double()),
        BLOCK_NOISE_FLOOR,
    )
    assert all(torch.equal(ours[name], value) for name, value in before.items())


@pytest.mark.parametrize("use_reentrant", [True, False])
@each_mode
def test_checkpointing(block, training, use_reentrant):
    block.train(training)
    whole = copy.deepcopy(block)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(block, x, use_reentrant=use_reentrant)

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    with CalledOps() as called:
        Checkpointed()(x).square().sum().backward()
    assert called.names == ["inception_forward", *FUSED]
    whole(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for a, b in zip(block.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@each_mode
def test_two_backward_passes_and_accumulation(block, training):
    block.train(training)
    y = block(X)
    y.sum().backward(retain_graph=True)
    once = [p.grad.clone() for p in block.parameters()]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    for parameter, grad_once in zip(block.parameters(), once, strict=True):
        assert torch.equal(parameter.grad, 2 * grad_once)

    block.zero_grad()
    for _ in range(3):
        block(X).sum().backward()
    for parameter, grad_once in zip(block.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 3 * grad_once)


def test_an_input_changed_in_place_is_noticed(block):
    x = X.clone()
    y = block(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = block(X)
    with torch.no_grad():
        block.branch2[1].conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_output_may_be_changed_in_place(block):
    expected = block(X) * 2
    (expected.sum()).backward()
    first = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(X).mul_(2).sum().backward()
    for parameter, gradient in zip(block.parameters(), first, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_gradients_own_their_memory(block):
    """In the layout of their parameters, none a part of another."""
    for module in (block, make_block().to(memory_format=torch.channels_last)):
        module(X).sum().backward()
        for parameter in module.parameters():
            assert strides(parameter.grad) == strides(parameter)
        storages = {p.grad.untyped_storage().data_ptr() for p in module.parameters()}
        assert len(storages) == len(list(module.parameters()))


# Autocast


@each_mode
def test_autocast(block, training):
    block.train(training)
    plain = copy.deepcopy(block)
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with CalledOps() as called:
            ours = block(x)
            ours.sum().backward()
        expected = without_kernels(lambda: plain(x))
    expected.sum().backward()
    assert called.names == FUSED
    assert ours.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6)
    for a, b in zip(block.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "x"),
    [(torch.bfloat16, X), (torch.float16, X), (torch.float16, X.bfloat16())],
    ids=str,
)
def test_autocast_that_would_cast_the_input(block, dtype, x):
    """Pooling before the cast and after it differ in where gradients of near ties go."""
    plain = copy.deepcopy(block)
    with torch.autocast("cpu", dtype), CalledOps() as called:
        y = block(x)
        expected = without_kernels(lambda: plain(x))
    assert "inception_forward" not in called.names
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)


@each_mode
def test_autocast_of_the_network(training):
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(10, init_weights=False).train(training)
    with torch.autocast("cpu", torch.bfloat16), CalledOps() as called:
        outputs = model(torch.randn(2, 3, 64, 64))
        logits = outputs.logits if training else outputs
    assert called.names.count("inception_forward") == 9
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_ops_keep_their_dtype_under_autocast(block):
    block.eval()
    expected = block(X)
    with torch.autocast("cpu", torch.bfloat16):
        pooled = functional.max_pool(X, 3, 2)
        normed = functional.batch_norm_relu(
            X, torch.ones(16), torch.ones(16), torch.zeros(16), torch.ones(16), False, 0.1, 1e-3
        )
        with torch.autocast("cpu", enabled=False), CalledOps() as called:
            assert torch.equal(block(X), expected)
    assert called.names == ["inception_forward"]
    assert pooled.dtype == normed.dtype == torch.float32
    assert torch.equal(pooled, F.max_pool2d(X, 3, 2))


# Memory


def saved_storages(run: Callable[[], Tensor]) -> tuple[Tensor, list[StorageWeakRef]]:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    return y, saved


@each_mode
@pytest.mark.parametrize("how", ["backward", "dropped"])
def test_saved_tensors_are_freed(block, training, how):
    block.train(training)
    gc.disable()  # by counting references alone
    try:
        y, saved = saved_storages(lambda: block(X.clone().requires_grad_()))
        mine = {StorageWeakRef(p.untyped_storage()) for p in block.parameters()}
        assert len(saved) == 19 + 10
        if how == "backward":
            y.sum().backward()
            output = y.detach()
        else:
            output = torch.empty(0)
        del y
        alive = [s for s in saved if not s.expired() and s not in mine]
        assert alive == [] and output is not None
    finally:
        gc.enable()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it here")
def test_training_does_not_grow():
    torch.manual_seed(0)
    block = Inception(64, 32, 32, 48, 16, 32, 32)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    x = randn(4, 64, 28, 28).requires_grad_()

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
        return resident_bytes()

    before = steps(10)
    assert steps(50) - before < 8 * 2**20  # one step alone saves more than 4 MB


# Processes


def run_python(code: str, path: Path | None = None, **environment: str) -> SimpleNamespace:
    """Runs code, with the package of the given directory or the one that is tested here."""
    root = path or Path(inception_ext.__file__).parents[1]
    # An editable install would find, in its own directory, what is missing here.
    no_editable = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{no_editable}\n{code}"],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{Path(__file__).parent}",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr)


RUN_A_BLOCK = """
import os, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import inception_ext
    import inception_ext.functional
import torch
from fast_path import CalledOps
from inception_ext import _library, functional
ours = [w for w in caught if "inception_ext" in str(w.message)]
assert inception_ext.__file__.startswith(os.getcwd()), inception_ext.__file__
state, x, expected = torch.load(os.environ["CASE"])
block = inception_ext.Inception(16, 8, 8, 12, 4, 8, 8)
block.load_state_dict(state)
with CalledOps() as called:
    y = block(x)
    y.sum().backward()
assert called.names == []
torch.testing.assert_close(y.detach(), expected)
"""


@pytest.fixture
def case(tmp_path, block) -> str:
    """A file with a block's state, an input and the output in training."""
    state = {k: v.clone() for k, v in block.state_dict().items()}
    expected = without_kernels(lambda: block(X)).detach()
    torch.save((state, X, expected), tmp_path / "case.pt")
    return str(tmp_path / "case.pt")


def test_disabled_by_the_environment(case):
    code = RUN_A_BLOCK + (
        "assert not ours and _library.is_available()\nprint(functional.why_unavailable())\n"
    )
    result = run_python(code, CASE=case, INCEPTION_EXT_DISABLE="1")
    assert result.code == 0, result.err
    assert "INCEPTION_EXT_DISABLE=1" in result.out


@pytest.fixture
def unbuilt(tmp_path) -> Path:
    """The package without its binary."""
    source = Path(inception_ext.__file__).parent
    shutil.copytree(
        source, tmp_path / "inception_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_without_the_binary(case, unbuilt):
    code = RUN_A_BLOCK + (
        "[warning] = ours\n"
        "assert warning.category is RuntimeWarning, warning\n"
        "assert not _library.is_available() and '_C' in _library.load_error()\n"
        "assert functional.why_unavailable() in repr(block) and 'missing' in repr(block)\n"
        "assert not hasattr(torch.ops.inception_ext, 'max_pool_forward')\n"
        "info = _library.build_info()\n"
        "assert info['version'] == inception_ext.__version__ and info['cuda'] is None\n"
        "model = inception_ext.googlenet(num_classes=10, init_weights=False)\n"
        "model(torch.randn(2, 3, 64, 64)).logits.sum().backward()\n"
        "assert inception_ext.freeze(model)(torch.randn(1, 3, 64, 64)).shape == (1, 10)\n"
    )
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err


def test_without_the_binary_where_it_is_required(unbuilt):
    result = run_python("import inception_ext", unbuilt, INCEPTION_EXT_REQUIRE="1")
    assert result.code == 1
    assert "ImportError: inception_ext: the compiled kernels are missing" in result.err
    assert "INCEPTION_EXT_REQUIRE=1" in result.err


def test_a_binary_that_does_not_load(case, unbuilt):
    (unbuilt / "inception_ext" / "_C.abi3.so").write_bytes(b"no library")
    code = RUN_A_BLOCK + "assert len(ours) == 1\nprint(_library.load_error())\n"
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err
    assert "_C.abi3.so" in result.out


def test_a_binary_of_other_sources(case, unbuilt):
    """One that lacks an op, as after a pull without a build."""
    shutil.copy(_library._C.__file__, unbuilt / "inception_ext")
    fakes = unbuilt / "inception_ext" / "_fake_kernels.py"
    sources = fakes.read_text()
    newer = sources.replace('("max_pool_forward",', '("a_new_op",')
    assert newer != sources
    fakes.write_text(newer)
    code = RUN_A_BLOCK + "assert len(ours) == 1\nprint(_library.load_error())\n"
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err
    assert "was built from other sources" in result.out and "a_new_op" in result.out


# Converted models


def test_accelerated_models_are_fused(tv_googlenet):
    torch.manual_seed(0)
    model = tv_googlenet.GoogLeNet(10, init_weights=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        inception_ext.accelerate(model)
        with CalledOps() as called:
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert called.names.count("inception_forward") == 9
    check(inception_ext.accelerate(nn.Sequential(tv_googlenet.Inception(16, 8, 8, 12, 4, 8, 8))))


def test_the_reference_is_what_is_fallen_back_to(block):
    """functional and reference have the same signature."""
    arguments = (X, None, None, *(torch.ones(16) for _ in range(2)), True, 0.1, 1e-3)
    with CalledOps() as called:
        y = functional.batch_norm_relu(*arguments)
    assert called.names == []
    assert torch.equal(y, reference.batch_norm_relu(*arguments))
    for name in ("batch_norm_relu", "conv_chain", "inception", "max_pool"):
        ours, plain = (inspect.signature(getattr(m, name)) for m in (functional, reference))
        assert list(ours.parameters) == list(plain.parameters)


@pytest.mark.parametrize(
    ("info", "capability", "reason"),
    [
        ({"cuda": None, "architectures": []}, (9, 0), "the binary was built without CUDA"),
        ({"cuda": "13.0", "architectures": ["sm_80", "sm_90a"]}, (9, 0), None),
        ({"cuda": "13.0", "architectures": ["sm_80", "sm_90a"]}, (8, 6), None),
        ({"cuda": "13.0", "architectures": ["sm_80", "compute_90"]}, (12, 0), None),
        (
            {"cuda": "13.0", "architectures": ["sm_80", "sm_90a"]},
            (12, 0),
            "the binary has no code for capability 12.0: sm_80, sm_90a",
        ),
    ],
)
def test_a_gpu_that_the_binary_does_not_cover_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    info: dict[str, object],
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    monkeypatch.setattr(_library, "build_info", lambda: info)
    assert _library.why_not_on.__wrapped__(capability) == reason
