"""What torch.compile is told about our functions."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["constant_while_tracing", "is_exporting"]

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(function: F) -> F:
    """Has torch.compile call a function while it traces, and keep what it returned.

    As :func:`torch.compiler.assume_constant_result`, which imports the whole compiler for that:
    half of the time that ``import inception_ext`` would take.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_tracing  # torch 2.11's compiler puts True in its place, exporting or not
def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``."""
    return torch.compiler.is_exporting()
