"""Imports torchvision where its wheel does not fit the torch beside it.

torchvision's operators are built for one torch: beside another, say a CPU-only one, its binary does
not load, and ``import torchvision`` fails on the first operator that it wants to describe. Its
models need none of them.
"""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_stubs: list[torch.library.Library] = []  # a Library takes its operators along when it is collected


def import_torchvision() -> ModuleType:
    """``import torchvision``, if need be with stand-ins for the operators that are missing.

    The stand-ins are names without kernels. They go by what ``torchvision/_meta_registrations.py``
    describes, so they follow the installed version.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None  # it was found a moment ago
    source = (Path(spec.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    stubs = torch.library.Library("torchvision", "FRAGMENT")
    for operator in sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"\)', source))):
        stubs.define(f"{operator}(Tensor _) -> Tensor")
    _stubs.append(stubs)
    return importlib.import_module("torchvision")
