"""The launches of our ops that a call makes: caught with their arguments, to be checked and timed.

What is caught is caught at PyTorch's dispatcher, so nothing here knows how a network is planned.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from inception_ext import reference
from inception_ext._fake_kernels import INFERENCE_OPS

__all__ = ["Catch", "Check", "Launch", "check", "describe", "flops", "touched_bytes"]

_NAMESPACES = ("inception_ext", "inception_ext_emulated")
_EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
_TF32_EPS = 2.0**-10


class Launch(NamedTuple):
    """A call of an op; calling it runs the op on the same tensors again."""

    op: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> None:
        self.op(*self.arguments)

    @property
    def name(self) -> str:
        return str(self.op._schema.name).partition("::")[2]


class Catch(TorchDispatchMode):
    """Within it, ``launches`` collects inference ops that run; with ``checking``, ``checks``."""

    def __init__(self, checking: bool = False) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.checks: list[Check] = []
        self._checking = checking

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        launch = Launch(func, tuple(args))
        if func.namespace not in _NAMESPACES or launch.name not in INFERENCE_OPS:
            return func(*args, **(kwargs or {}))
        self.launches.append(launch)
        if self._checking:
            self.checks.append(check(launch))  # runs it
        else:
            func(*args)
        return None


class Check(NamedTuple):
    """How far a launch is from float64, and how far it may be, relative to the largest value."""

    name: str
    error: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


def check(launch: Launch) -> Check:
    """Runs an op that writes into tensors of the caller, and its plain twin in two precisions.

    The limit is that of the tests: twice the error of the twin in the same dtype, plus 4 units in
    the last place.
    """
    name = launch.name
    twin = getattr(reference, {"lrn": "lrn_out"}.get(name, name))
    written = list(_written(launch.op, launch.arguments))
    exact, exact_outputs = _on_copies(launch, torch.float64)
    eager, eager_outputs = _on_copies(launch, None)
    twin(*exact)
    twin(*eager)
    launch()
    errors, theirs = [], []
    for ours, plain, truth in zip(written, eager_outputs, exact_outputs, strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 1.0
        for y, found in ((ours, errors), (plain, theirs)):
            difference = (y.double() - truth).abs()
            worst = float(difference.max()) if difference.numel() else 0.0
            found.append(worst / (scale or 1.0))
    dtype = written[0].dtype
    rounded = dtype == torch.float32 and not _argument(launch, "exact", True)
    eps = _TF32_EPS if rounded else _EPS[dtype]
    error = max(errors) if all(e == e for e in errors) else float("nan")
    return Check(describe(launch), error, max(theirs), 2 * max(theirs) + 4 * eps)


def _on_copies(launch: Launch, dtype: torch.dtype | None) -> tuple[list[Any], list[Tensor]]:
    """Arguments with floating tensors in dtype (None: as they are), and the new outputs in them."""
    written = {id(y) for y in _written(launch.op, launch.arguments)}
    outputs: list[Tensor] = []

    def copied(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [copied(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        if id(value) in written:
            outputs.append(torch.empty_like(value, dtype=dtype or value.dtype))
            return outputs[-1]
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return [copied(value) for value in launch.arguments], outputs


def _written(op: Any, arguments: Sequence[Any]) -> Iterator[Tensor]:
    """The tensors that an op returns through its arguments; not its scratch memory."""
    for argument, value in zip(op._schema.arguments, arguments, strict=False):
        info = argument.alias_info
        if info is not None and info.is_write and argument.name != "workspace":
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _argument(launch: Launch, name: str, default: Any) -> Any:
    for argument, value in zip(launch.op._schema.arguments, launch.arguments, strict=False):
        if argument.name == name:
            return value
    return default


def describe(launch: Launch) -> str:
    """Op and shapes, such as ``conv_group 192x28x28, 192x28x28 -> 64, 96, 16, 32``."""
    written = list(_written(launch.op, launch.arguments))
    read = ["x".join(map(str, x.shape[1:])) for x in _tensors(_argument(launch, "x", ()))]
    return f"{launch.name} {', '.join(read)} -> {', '.join(str(y.shape[1]) for y in written)}"


def flops(launch: Launch) -> int:
    """Useful floating-point operations of convolutions, by the formulas that torch was given."""
    formula = flop_registry.get(launch.op._overloadpacket)
    return int(formula(*launch.arguments, out_val=None)) if formula else 0


def touched_bytes(launch: Launch) -> int:
    """Bytes that have to be read or written at least once: each tensor's elements."""
    seen = {}
    for argument, value in zip(launch.op._schema.arguments, launch.arguments, strict=False):
        if argument.name != "workspace":
            for tensor in _tensors(value):
                key = (tensor.data_ptr(), tensor.shape, tensor.stride())
                seen[key] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
