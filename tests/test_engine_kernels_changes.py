"""freeze() on the CUDA kernels of modules that are not GoogLeNet's own, and after changes."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases import (
    OnCPU,
    assert_as_good_as_the_model,
    assert_logits_as_good_as_the_models,
    enliven,
    images,
    normalised,
)
from kernel_devices import each_device
from torch import Tensor, nn

import inception_ext
from inception_ext._watch import Watch
from inception_ext.engine import Engine
from inception_ext.modules import BasicConv2d, Inception

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 as on the CPU, which the errors are held against; TF32 has a test of its own."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


# Modules that are not GoogLeNet's own


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def set_module(name: str, make: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.set_submodule(name, make())


def hook(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(lambda _, __, y: y * 1.5)


UNUSUAL: dict[str, tuple[Callable[[Any], None], int]] = {
    "a hook on conv1": (hook("conv1"), 15),
    "a hook on the first pool": (hook("maxpool1"), 15),
    "a hook on conv3": (hook("conv3"), 15),
    "a hook on a block": (hook("inception4a"), 15),
    "a hook on a branch": (hook("inception3a.branch2"), 15),
    "a hook on the last block": (hook("inception5b"), 15),
    "a hook on the average pool": (hook("avgpool"), 16),
    "a hook on dropout": (hook("dropout"), 16),
    "a hook on fc": (hook("fc"), 16),
    "another average pool": (set_module("avgpool", lambda: nn.AdaptiveMaxPool2d((1, 1))), 16),
    "no fc": (lambda model: model.reset_classifier(0), 16),
    "two layers for fc": (
        set_module("fc", lambda: nn.Sequential(nn.Linear(1024, 32), nn.Linear(32, 10))),
        16,
    ),
    "no bias in fc": (set_module("fc", lambda: nn.Linear(1024, 10, bias=False)), 16),
    "another block": (set_module("inception4b", lambda: nn.Conv2d(512, 512, 1)), 15),
    "another conv in a branch": (
        set_module(
            "inception5a.branch3.1.conv",
            lambda: nn.Conv2d(32, 128, (3, 1), padding=(1, 0), bias=False),
        ),
        15,
    ),
    "a wide conv in a branch": (
        set_module("inception5a.branch3.1.conv", lambda: nn.Conv2d(32, 128, 7, padding=3)),
        16,
    ),
    "another pool in a block": (
        set_module("inception4a.branch4.0", lambda: nn.MaxPool2d(5, 1, 2)),
        15,
    ),
    "another first pool": (set_module("maxpool1", lambda: nn.MaxPool2d(2, 2)), 16),
    "a pool of another kind": (set_module("maxpool2", lambda: nn.AvgPool2d(3, 2)), 15),
    "another conv1": (
        lambda model: model.conv1.__setattr__("conv", nn.Conv2d(3, 64, 5, 2, 2)),
        16,
    ),
    "a conv1 with a stride of 3": (
        lambda model: model.conv1.__setattr__("conv", nn.Conv2d(3, 64, 7, 3, 3)),
        15,
    ),
}


@each_device
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_modules(models, device, name):
    """What no kernel stands for is called as it is; the rest stays fused."""
    model = copy.deepcopy(models["ours"])
    torch.manual_seed(6)
    change, fused = UNUSUAL[name]
    change(model)
    engine = OnCPU(model, torch.float16, device)
    x = normalised(images(1, 47, 47))
    assert_as_good_as_the_model(engine, model, x)
    assert f"{fused} of 16 steps fused" in repr(engine.engine)
    assert engine(images(0, 47, 47)).shape[0] == 0


@each_device
def test_blocks_of_other_widths(device):
    """A network of blocks that no kernel has been made for: every width is odd."""

    def narrow(c: int) -> int:
        return c if c == 3 else c // 8 | 1

    class Conv(BasicConv2d):
        def __init__(self, c_in: int, c_out: int, **kwargs: Any) -> None:
            super().__init__(narrow(c_in), narrow(c_out), **kwargs)

    class Block(Inception):
        def __init__(self, c_in: int, *widths: int, **kwargs: Any) -> None:
            super().__init__(inputs[c_in], *widths, conv_block=Conv)

    class Identity(nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x

    inputs = {c: c for c in (192, 256, 480, 512, 528, 832)}
    model = inception_ext.GoogLeNet(
        10, aux_logits=False, init_weights=False, blocks=[Conv, Block, Identity]
    )
    # The concatenations of odd widths are what the next block reads.
    previous = narrow(192)
    for block in model.children():
        if isinstance(block, Inception):
            for conv in (block.branch1, block.branch2[0], block.branch3[0], block.branch4[1]):
                conv.conv = nn.Conv2d(previous, conv.conv.out_channels, 1, bias=False)
            branches = (block.branch1, block.branch2[1], block.branch3[1], block.branch4[1])
            previous = sum(branch.conv.out_channels for branch in branches)
    model.fc = nn.Linear(previous, 11)
    enliven(model)
    x = normalised(images(2, 47, 64))
    for dtype in DTYPES:
        engine = OnCPU(model, dtype, device)
        assert_as_good_as_the_model(engine, model, x)
    assert "16 of 16 steps fused" in repr(engine.engine)


# Changes


CHANGES: dict[str, Callable[[Any], Any]] = {
    "convolution weight": lambda m: m.inception3a.branch2[1].conv.weight.mul_(0.5),
    "running var": lambda m: m.inception4e.branch3[0].bn.running_var.mul_(0.5),
    "fc": lambda m: m.fc.bias.add_(1.0),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
    "a new fc": lambda m: setattr(m, "fc", nn.Linear(1024, 7, device=m.fc.weight.device)),
    "a hook": hook("inception4c"),
    "transform_input": lambda m: setattr(m, "transform_input", True),
    "the window of a pool": lambda m: setattr(m.maxpool3, "kernel_size", 2),
    "the rounding of a pool": lambda m: setattr(m.maxpool3, "ceil_mode", False),
    "the normalisation": lambda m: setattr(m.lrn2, "alpha", 50.0),
}


@each_device
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(models, device, name):
    engine = OnCPU(models["bvlc" if name == "the normalisation" else "ours"], torch.float16, device)
    x = normalised(images(1, 49, 49))
    before = engine(x)
    with torch.no_grad():
        CHANGES[name](engine.model)
    after = engine(x)
    assert_logits_as_good_as_the_models(after, copy.deepcopy(engine.model).cpu(), x)
    assert before.shape != after.shape or not torch.equal(before, after)


@each_device
def test_the_kernels_run_while_the_model_is_looked_at(models, device, monkeypatch):
    """But where a module of the model is called, which must not happen twice, the look is first."""
    order: list[str] = []

    def note(owner: type, method: str, name: str) -> None:
        original = getattr(owner, method)

        def noted(*args: Any) -> Any:
            order.append(name)
            return original(*args)

        monkeypatch.setattr(owner, method, noted)

    def taken() -> list[str]:
        result = order.copy()
        order.clear()
        return result

    engine = OnCPU(models["ours"], torch.float16, device)
    note(Engine, "_run", "run")
    note(Watch, "changed", "look")
    x = normalised(images(1, 33, 33))
    engine(x)
    assert taken() == ["run", "look"]
    with pytest.raises(ValueError, match="images"):
        engine(x[0])
    assert taken() == ["run", "look"]
    with torch.no_grad():
        engine.model.fc.bias.add_(1.0)
    after = engine(x)
    assert taken() == ["run", "look", "run"]
    assert_logits_as_good_as_the_models(after, copy.deepcopy(engine.model).cpu(), x)
    seen: list[str] = []
    engine.model.inception4c.register_forward_hook(lambda *_: seen.append("hook"))
    for calls in (1, 2):
        engine(x)
        assert taken() == (["run", "look", "run"] if calls == 1 else ["look", "run"])
        assert len(seen) == calls
