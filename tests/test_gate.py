"""The compiled ops run where they give what plain PyTorch gives, and nowhere else.

For each condition: which ops were called, and results, gradients and buffers held to the plain path
(``use_kernels(False)``) with float64 as the judge.
"""

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fast_path import CalledOps, randn
from gate_cases import (
    X,
    check,
    check_not_fused,
    each_mode,
    make_block,
    results_of,
)
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune

import inception_ext
from inception_ext import _library, functional, reference
from inception_ext.modules import BasicConv2d, Inception

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


def with_function(parent: str, name: str) -> Callable[[Inception], None]:
    """A function in place of a module: nn.Module does not list it among its children."""

    def change(block: Inception) -> None:
        module = block.get_submodule(parent)
        delattr(module, name)
        setattr(module, name, lambda x: x[:, :8].sigmoid())

    return change


def as_plain_tensors(module: str, *names: str) -> Callable[[Inception], None]:
    """Parameters or buffers as tensors that nn.Module does not list among its own."""

    def change(block: Inception) -> None:
        parent = block.get_submodule(module)
        for name in names:
            tensor = getattr(parent, name).detach()
            delattr(parent, name)
            setattr(parent, name, tensor)

    return change


def weight_as_buffer(block: Inception) -> None:
    conv = block.branch2[1].conv
    weight = conv.weight.detach()
    del conv.weight
    conv.register_buffer("weight", weight)


def bias_as_plain_tensor(block: Inception) -> None:
    conv = block.branch1.conv
    del conv.bias
    conv.bias = torch.ones(8)


def untracked_statistics_as_plain_tensors(block: Inception) -> None:
    as_plain_tensors("branch1.bn", "running_mean", "running_var", "num_batches_tracked")(block)
    block.branch1.bn.track_running_stats = False


REBUILT: dict[str, Callable[[Inception], object]] = {
    "weight as a buffer": weight_as_buffer,
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
    "a function for a norm": with_function("branch1", "bn"),
    "a function for a convolution": with_function("branch4.1", "conv"),
    "a function for a block": with_function("", "branch1"),
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


PLAIN_TENSORS: dict[str, Callable[[Inception], None]] = {
    "weight": as_plain_tensors("branch2.1.conv", "weight"),
    "bias": bias_as_plain_tensor,
    "batch norm": as_plain_tensors("branch1.bn", "weight", "bias"),
    "statistics": as_plain_tensors(
        "branch1.bn", "running_mean", "running_var", "num_batches_tracked"
    ),
    "untracked statistics": untracked_statistics_as_plain_tensors,
}


@each_mode
@pytest.mark.parametrize("change", PLAIN_TENSORS)
def test_plain_tensors_for_parameters(change, training):
    """As networks have them that make their own weights; .double() does not reach these."""
    block = make_block().train(training)
    PLAIN_TENSORS[change](block)
    plain = copy.deepcopy(block)
    with CalledOps() as called:
        y = block(X)
    assert "inception_forward" not in called.names
    with functional.use_kernels(False):
        torch.testing.assert_close(y, plain(X))


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
