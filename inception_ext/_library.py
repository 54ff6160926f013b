"""Loads the compiled ops (``_C``) and tells torch what it cannot see in them.

Importing this module registers ``torch.ops.inception_ext.*``, their fake (meta) kernels and their
flop formulas. Where ``_C`` is missing or does not load, one warning says so, the package runs on
its reference path, and :func:`load_error` keeps the reason; under ``INCEPTION_EXT_REQUIRE=1`` it is
an ImportError instead.
"""

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from inception_ext import _fake_kernels, _flop_formulas, _process_group
from inception_ext._architectures import covering_architecture
from inception_ext._version import __version__

__all__ = [
    "build_info",
    "is_available",
    "load_error",
    "why_not_on",
]

_load_error: str | None = None


def _do_without(error: Exception) -> None:
    """Says that the binary is of no use, and why."""
    global _C, _load_error
    _C = None
    _load_error = str(error)
    message = (
        f"inception_ext: the compiled kernels are missing ({error}); everything runs on the plain "
        "PyTorch path. Build them with 'pip install --no-build-isolation .' in a source checkout."
    )
    if os.environ.get("INCEPTION_EXT_REQUIRE") == "1":
        raise ImportError(f"{message} (INCEPTION_EXT_REQUIRE=1 makes this an error)") from error
    warnings.warn(message, RuntimeWarning, stacklevel=3)


try:
    from inception_ext import _C  # type: ignore[attr-defined]
except ImportError as error:
    _do_without(error)


# Whether the CUDA kernels run on the emulator, in the place of the CPU's: see testing.emulated.
_emulated = False


def set_emulated(emulated: bool) -> bool:
    """Turns emulation on or off for the whole process; what it was before."""
    global _emulated
    before = _emulated
    _emulated = emulated
    return before


def device_type(x: Tensor) -> str:
    """The device whose kernels serve ``x``: ``"cuda"`` for a CPU tensor under emulation."""
    return "cuda" if _emulated and x.device.type == "cpu" else x.device.type


def ops(x: Tensor) -> Any:
    """The namespace of the ops that serve ``x``."""
    if _emulated and x.device.type == "cpu":
        return torch.ops.inception_ext_emulated
    return torch.ops.inception_ext


def is_available() -> bool:
    """Whether the compiled ops are loaded."""
    return _C is not None


def load_error() -> str | None:
    """Why the compiled ops did not load, or None."""
    return _load_error


def build_info() -> dict[str, Any]:
    """What the binary holds.

    Returns:
        ``version``; ``cuda``: the toolkit's version, or None; ``architectures``: list such as
        ``["sm_90a", "compute_120"]``; ``cpu_isa``: what the CPU kernels use on this machine;
        ``torch_built_with``. All but ``version`` are None or empty without the binary.
    """
    if _C is None:
        return {
            "version": __version__,
            "cuda": None,
            "architectures": [],
            "cpu_isa": None,
            "torch_built_with": None,
        }
    info: dict[str, Any] = _C.build_info()
    info["cuda"] = info["cuda"] or None
    info["architectures"] = [a for a in info["architectures"].split(",") if a]
    return info


@functools.cache
def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the binary's CUDA kernels do not run on a device of this capability, or None."""
    info = build_info()
    if not info["cuda"]:
        return "the binary was built without CUDA"
    text = "{}.{}".format(*capability)
    if covering_architecture(info["architectures"], text) is None:
        return f"the binary has no code for capability {text}: {', '.join(info['architectures'])}"
    return None


def register(namespace: str) -> None:
    """Tells torch what it cannot see in one namespace of the ops, and these what they call in
    Python."""
    _process_group.implement(namespace)
    _fake_kernels.register(namespace)
    _flop_formulas.register(namespace)


if _C is not None:
    try:
        register("inception_ext")
    except RuntimeError as error:  # torch names the op that is not there
        _do_without(ImportError(f"{_C.__file__} was built from other sources: {error}"))
