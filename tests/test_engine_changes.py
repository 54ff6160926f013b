"""freeze() after a change of the model: what is noticed, and what is not read anew."""

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_cases import (
    LAYOUTS,
    assert_as_good_as_the_model,
    assert_logits_as_good_as_the_models,
    enliven,
    images,
    normalised,
)
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize, prune

import inception_ext
from inception_ext.engine import Engine, freeze
from inception_ext.modules import BasicConv2d, Inception


@pytest.fixture
def refolds(monkeypatch) -> Iterator[list[Engine]]:
    """Collects an entry for each time that an engine reads its model anew."""
    calls: list[Engine] = []
    refresh = Engine.refresh

    def counting(self: Engine) -> None:
        calls.append(self)
        refresh(self)

    monkeypatch.setattr(Engine, "refresh", counting)
    return calls


def a_step(model: nn.Module, optimizer_class: Any = torch.optim.SGD, **kwargs: Any) -> None:
    model.train()
    optimizer = optimizer_class(model.parameters(), lr=0.05, **kwargs)
    outputs = model(normalised(images(4, 64, 64, seed=2)))
    inception_ext.GoogLeNetLoss()(outputs, torch.arange(4)).backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


class PlainSGD(torch.optim.Optimizer):
    """Written as before PyTorch 0.4, past the version counters."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad.data, alpha=-self.param_groups[0]["lr"])


def recalibrate(model: nn.Module) -> None:
    """New running statistics, without gradients."""
    with torch.no_grad():
        model.train()(normalised(images(4, 64, 64, seed=3)) * 2)
    model.eval()


def halve(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(0.5)


def round_trip(model: nn.Module) -> None:
    """Every weight loses digits and may get its old address back."""
    model.bfloat16()
    model.float()


def two_assignments(model: nn.Module) -> None:
    for parameter in model.parameters():
        values = parameter.detach() * 0.9
        parameter.data = torch.empty(0)
        parameter.data = values


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LeakyConv(BasicConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), 0.3)


class ScaledInception(Inception):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [y * 1.5 for y in super()._forward(x)]


def in_another_class(name: str, cls: type[nn.Module]) -> Callable[[nn.Module], None]:
    """The same parameters in a module of another class."""

    def change(model: nn.Module) -> None:
        module = cls.__new__(cls)
        module.__dict__.update(model.get_submodule(name).__dict__)
        model.set_submodule(name, module)

    return change


def new_fc(model: Any) -> None:
    torch.manual_seed(5)
    model.fc = nn.Linear(1024, 7)


def hook(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: model.get_submodule(name).register_forward_hook(lambda _, __, y: y * 1.5)


def pre_hook(name: str) -> Callable[[nn.Module], Any]:
    return lambda model: model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: inputs[0] * 1.5
    )


def patch_forward(model: Any) -> None:
    block = model.inception4b  # the method of a copy is bound to the copy
    block.forward = MethodType(lambda self, x: Inception.forward(self, x) * 1.5, block)


def set_attribute(name: str, attribute: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(name), attribute, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a step of SGD": a_step,
    "a step of Adam": lambda m: a_step(m, torch.optim.Adam, foreach=True),
    "a step past the version counters": lambda m: a_step(m, PlainSGD),
    "running statistics, on the fast path": recalibrate,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
    "load_state_dict(assign=True)": lambda m: m.load_state_dict(
        {k: v * 0.9 for k, v in m.state_dict().items()}, assign=True
    ),
    "convolution weight": lambda m: halve(m.inception3a.branch2[1].conv.weight),
    "batch norm weight": lambda m: halve(m.inception5b.branch4[1].bn.weight),
    "batch norm bias": lambda m: halve(m.conv1.bn.bias),
    "running mean": lambda m: halve(m.conv3.bn.running_mean),
    "running var": lambda m: halve(m.inception4e.branch3[0].bn.running_var),
    "fc": lambda m: halve(m.fc.bias),
    ".data": lambda m: setattr(m.conv2.conv.weight, "data", m.conv2.conv.weight.data * 0.5),
    ".data twice": two_assignments,
    "a new parameter": lambda m: setattr(
        m.conv2.conv, "weight", nn.Parameter(m.conv2.conv.weight * 0.5)
    ),
    ".bfloat16().float()": round_trip,
    "a new fc": new_fc,
    "reset_classifier": lambda m: m.reset_classifier(5),
    "a bias": set_attribute("conv1.conv", "bias", nn.Parameter(torch.ones(64))),
    "no batch norm": set_attribute("conv2", "bn", nn.Identity()),
    "another block": set_attribute("inception4c", "branch4", nn.Conv2d(512, 64, 1)),
    "a replaced block": lambda m: setattr(m, "inception5b", nn.Conv2d(832, 1024, 1)),
    "a block more": lambda m: m.inception3b.branch2.append(Doubled()),
    "a convolution of another class": in_another_class("conv3", LeakyConv),
    "one within a block": in_another_class("inception4a.branch2.0", LeakyConv),
    "an Inception of another class": in_another_class("inception4a", ScaledInception),
    "another pool": lambda m: setattr(m, "maxpool2", nn.AvgPool2d(3, 2, ceil_mode=True)),
    "another pool in a block": set_attribute("inception4a.branch4", "0", nn.AvgPool2d(3, 1, 1)),
    "another average pool": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d((1, 1))),
    "something for dropout": lambda m: setattr(m, "dropout", Doubled()),
    "a hook on a block": hook("inception4a"),
    "a hook on a branch": hook("inception4a.branch2"),
    "a hook on a batch norm": hook("inception4a.branch2.0.bn"),
    "a hook on a convolution": hook("conv2.conv"),
    "a hook on a pool": hook("maxpool3"),
    "a hook on dropout": hook("dropout"),
    "a hook on avgpool": hook("avgpool"),
    "a hook on fc": pre_hook("fc"),
    "a hook before a block": pre_hook("inception5a"),
    "a patched forward": patch_forward,
    "a parametrization": lambda m: parametrize.register_parametrization(
        m.inception3b.branch1.conv, "weight", Doubled()
    ),
    "pruning": lambda m: prune.l1_unstructured(m.conv3.conv, "weight", 0.5),
    "eps": set_attribute("conv1.bn", "eps", 0.5),
    "transform_input": lambda m: setattr(m, "transform_input", True),
    "stride": set_attribute("inception3a.branch4.0", "padding", 1),  # none
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(model, name):
    engine = freeze(model)
    x = normalised(images(2, 64, 64))
    before = engine(x)
    CHANGES[name](model)
    for _ in range(2):
        assert_as_good_as_the_model(engine, model, x)
    if name != "stride":
        assert before.shape != engine(x).shape or not torch.allclose(before, engine(x), rtol=1e-4)


def test_a_change_of_torchvisions_is_noticed(models):
    """Whose running statistics torch itself changes, without counting."""
    for change in (recalibrate, a_step):
        model = copy.deepcopy(models["torchvision"])
        engine = freeze(model)
        x = normalised(images(2, 64, 64))
        engine(x)
        change(model)
        assert_as_good_as_the_model(engine, model, x)


def test_a_hook_is_noticed_when_it_goes(model):
    engine = freeze(model)
    x = images(1, 33, 47)
    before = engine(x)
    seen: list[str] = []
    handles = [
        model.inception4a.register_forward_hook(lambda *_: seen.append("block")),
        model.inception4a.branch1.bn.register_forward_pre_hook(lambda *_: seen.append("bn")),
    ]
    hooked = engine(x)
    assert seen == ["bn", "block"] and "15 of 16 steps fused" in repr(engine)
    for handle in handles:
        handle.remove()
    assert torch.equal(engine(x), before)
    assert_logits_as_good_as_the_models(hooked, model, normalised(x))
    assert seen == ["bn", "block"] and "16 of 16 steps fused" in repr(engine)


def test_hooks_on_all_modules(model):
    engine = freeze(model)
    seen = []
    handle = global_hooks.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        engine(images(1, 33, 47))
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 57 and seen.count(nn.Linear) == 1
    engine(images(1, 33, 47))
    assert seen.count(nn.Conv2d) == 57


def test_a_new_dtype_of_the_model(model):
    engine, fixed = freeze(model), freeze(model, torch.float32)
    x = images(1, 33, 47)
    engine(x)
    model.bfloat16()
    assert engine(x).dtype == torch.bfloat16 and engine.dtype == torch.bfloat16
    assert fixed(x).dtype == torch.float32
    model.double()
    with pytest.raises(ValueError, match=r"dtype: expected .* got torch\.float64"):
        engine(x)
    model.float()
    assert engine(x).dtype == torch.float32


def test_nothing_is_read_anew_without_a_change(model, refolds):
    engine = freeze(model)
    assert len(refolds) == 1
    x = images(2, 33, 47)
    engine(x)
    model.train()
    model.eval()
    model.requires_grad_(False).requires_grad_(True)
    model.zero_grad()
    for given in (x, normalised(x), LAYOUTS["nhwc"](x)):
        engine(given)
    model(normalised(x)).sum().backward()
    model.state_dict()
    copy.deepcopy(model)
    repr(engine)
    engine(x)
    assert len(refolds) == 1
    halve(model.fc.weight)
    engine(x)
    engine(x)
    assert len(refolds) == 2


def test_what_cannot_be_noticed_can_be_told(model):
    engine = freeze(model)
    x = normalised(images(2, 33, 47))
    engine(x)
    model.conv1.conv.weight.data.mul_(0.5)
    engine.refresh()
    assert_as_good_as_the_model(engine, model, x)


def test_models_made_in_inference_mode():
    """Their tensors have no version."""
    with torch.inference_mode():
        model = enliven(inception_ext.GoogLeNet(10, aux_logits=False, init_weights=False))
        engine = freeze(model)
        x = normalised(images(1, 33, 47))
        assert_as_good_as_the_model(engine, model, x)
    engine(x)
    with torch.inference_mode():
        model.fc = nn.Linear(1024, 4)
        assert engine(x).shape == (1, 4)
