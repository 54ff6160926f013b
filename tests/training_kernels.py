"""The emulated launchers of batch_norm.h and pack_weights.h (tests/cpp/emulator/training.cpp)."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from emulator_build import build_library
from torch import Tensor

SOURCE = Path(__file__).parent / "cpp" / "emulator" / "training.cpp"
KERNELS = (
    "batch_norm_backward.cu",
    "batch_norm_finalize.cu",
    "batch_norm_forward.cu",
    "batch_norm_max_pool.cu",
    "pack_weights.cu",
)
SUCCESS, INVALID_VALUE = 0, 1
DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


@functools.cache
def load_module() -> ModuleType:
    path = build_library("training_kernels", SOURCE, python=True, kernels=KERNELS)
    spec = importlib.util.spec_from_file_location("training_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def emulator(seed: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Yields the launches of a block, once it ends."""
    module = load_module()
    launches: list[dict[str, Any]] = []
    module.take_launches()
    module.set_settings(seed=seed)
    yield launches
    launches += module.take_launches()


class Tensors:
    """The tensors of one launch: what the kernels may touch, and the fields that point there."""

    def __init__(self) -> None:
        self.declared: list[Any] = []

    def fields(self, use: str, **tensors: Tensor | None) -> dict[str, int]:
        """Addresses by name, without those that are None."""
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for name, tensor in given.items():
            self.declared.append(
                (
                    name,
                    getattr(load_module().Use, use),
                    tensor.data_ptr(),
                    tensor.element_size(),
                    list(tensor.shape),
                    list(tensor.stride()),
                )
            )
        return {name: tensor.data_ptr() for name, tensor in given.items()}


def require_success(code: int) -> None:
    assert code == SUCCESS, f"cudaError_t {code}"
