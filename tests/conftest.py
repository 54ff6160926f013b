"""Fixtures that the tests share."""

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from engine_cases import make_models
from gate_cases import make_block
from torch import Tensor, nn

import inception_ext
from inception_ext._torchvision import import_torchvision

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Garbage is collected less often, and never among what stays to the end: tests and torch."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """The real torchvision."""
    return import_torchvision()


@pytest.fixture(scope="session")
def tv_googlenet(torchvision: ModuleType) -> ModuleType:
    """torchvision/models/googlenet.py, what ours is held against.

    ``torchvision.models.googlenet`` is the function of the same name.
    """
    return sys.modules["torchvision.models.googlenet"]


@pytest.fixture(scope="session")
def lively_state(tv_googlenet: ModuleType) -> dict[str, Tensor]:
    """A float64 state_dict of a 10-class network whose every layer passes a signal on.

    As initialised, the activations all but vanish in eval mode, which would hide errors. Most
    units are active, which keeps the gradients from hanging on the sign of rounding errors.
    """
    torch.manual_seed(0)
    model = tv_googlenet.GoogLeNet(num_classes=10, init_weights=False).double()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.uniform_(module.bias, 0.4, 0.8)
            module.momentum = None  # the running statistics become those of the one batch
    model(torch.randn(8, 3, 64, 64, dtype=torch.float64))
    return model.state_dict()


@pytest.fixture
def make_pair(
    tv_googlenet: ModuleType, lively_state: dict[str, Tensor]
) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Makes (ours, torchvision's): 10 classes, equal parameters, no dropout unless asked for."""

    def make(dtype: torch.dtype = torch.float32, **kwargs: object) -> tuple[nn.Module, nn.Module]:
        kwargs = {"num_classes": 10, "dropout": 0.0, "dropout_aux": 0.0, **kwargs}
        pair = []
        for library in (inception_ext, tv_googlenet):
            model = library.GoogLeNet(init_weights=False, **kwargs).to(dtype)
            missing, _ = model.load_state_dict(lively_state, strict=False)
            assert not missing
            pair.append(model)
        return pair[0], pair[1]

    return make


@pytest.fixture
def trio(make_pair: Callable[..., tuple[nn.Module, nn.Module]]) -> tuple[nn.Module, ...]:
    """(ours, torchvision's, torchvision's in float64)."""
    return (*make_pair(), make_pair(torch.float64)[1])


@pytest.fixture
def hub_dir(tmp_path, monkeypatch) -> Iterator[str]:
    """An empty directory in the place of torch.hub's checkpoint cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    directory = tmp_path / "hub" / "checkpoints"
    directory.mkdir(parents=True)
    yield str(directory)


@pytest.fixture
def block() -> nn.Module:
    """An Inception module whose every channel passes a signal on."""
    return make_block()


@pytest.fixture(scope="session")
def models(tv_googlenet: ModuleType) -> dict[str, nn.Module]:
    """A GoogLeNet of each kind, in evaluation mode; not to be changed."""
    return make_models(tv_googlenet)


@pytest.fixture
def model(models: dict[str, nn.Module]) -> nn.Module:
    """A GoogLeNet that a test may change."""
    return copy.deepcopy(models["ours"])
