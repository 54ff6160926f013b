"""An engine within torch.compile: one op, which at run time does what a call outside does.

So compiled code notices new weights, and keeps the planned memory and the graphs.
"""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["call_engine", "number"]

_engines: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def number(engine: Any) -> int:
    """A new number, by which :func:`call_engine` finds the engine while it lives."""
    found = next(_numbers)
    _engines[found] = engine
    return found


# Where inductor makes CUDA graphs of its own, this is none of their parts.
@torch.library.custom_op(
    "inception_ext::call_engine", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def call_engine(images: Tensor, engine: int, width: int, dtype: torch.dtype) -> Tensor:
    """Logits ``[N, width]``, in dtype."""
    return _engines[engine](images)


@call_engine.register_fake
def _(images: Tensor, engine: int, width: int, dtype: torch.dtype) -> Tensor:
    return images.new_empty((images.shape[0], width), dtype=dtype)
