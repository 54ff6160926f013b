"""Names in profiles for what PyTorch's own hooks do not see.

Every op of ours goes through PyTorch's dispatcher, which names it ``inception_ext::...`` in
torch.profiler, and in NVTX under ``torch.autograd.profiler.emit_nvtx()``. A CUDA graph hides them:
:func:`region` names what replays one, and the frozen network as a whole. ``INCEPTION_EXT_NVTX=1``
makes NVTX ranges of the regions without any profiler, for Nsight Systems.
"""

import contextlib
import os
from typing import Any

import torch

__all__ = ["region"]

_nvtx = os.environ.get("INCEPTION_EXT_NVTX") == "1"
_nothing = contextlib.nullcontext()


def region(name: str) -> Any:
    """A context whose inside is called ``inception_ext::name``; nearly free where nobody looks."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if torch.autograd.profiler._is_profiler_enabled:
        return torch.profiler.record_function(f"inception_ext::{name}")
    if _nvtx and torch.cuda.is_available():
        return torch.cuda.nvtx.range(f"inception_ext::{name}")
    return _nothing
