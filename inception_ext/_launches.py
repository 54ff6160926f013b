"""Launches of the inference ops: started at once, or recorded and planned in one block of memory.

A step of a network is written once, against :class:`Launcher`. Run with one that starts kernels, it
computes; run with a :class:`Recorder` on tensors without memory, it leaves the list of launches,
from which a :class:`Plan` knows how long each tensor lives and where to put it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inception_ext import _library
from inception_ext._tracing import constant_while_tracing

__all__ = ["Exact", "Launcher", "Lifetime", "Plan", "Recorder", "new_workspace", "place"]

_ALIGNMENT = 256  # bytes, as those of torch's allocator at least


class Exact(NamedTuple):
    """Whether float32 is multiplied as such, and not as TF32."""

    convolutions: bool
    linear: bool

    @classmethod
    def by_torch(cls, dtype: torch.dtype) -> "Exact":
        """As torch's settings have it for its own convolutions and matrix products."""
        if dtype != torch.float32:
            return cls(True, True)  # one value, so that plans do not depend on the settings
        return cls(not _allows_tf32("conv"), not _allows_tf32("matmul"))


@constant_while_tracing  # compiled code keeps the setting that it was compiled under
def _allows_tf32(operation: str) -> bool:
    backends: Any = torch.backends
    backend = backends.cudnn.conv if operation == "conv" else backends.cuda.matmul
    return backend.fp32_precision == "tf32"


class Launcher:
    """Starts kernels at once, on tensors that are allocated one by one.

    Args:
        like: a tensor on the device that is to compute.
        dtype: of the activations.
        exact: see :class:`Exact`.
        workspace: of conv_group; None: a new one.
    """

    def __init__(
        self, like: Tensor, dtype: torch.dtype, exact: Exact, workspace: Tensor | None = None
    ) -> None:
        self._ops = _library.ops(like)
        self.device, self.dtype, self.exact = like.device, dtype, exact
        self.workspace = new_workspace(like) if workspace is None else workspace

    def empty(self, n: int, c: int, h: int, w: int) -> Tensor:
        """Memory for an activation ``[N, C, H, W]``, channels_last."""
        # Not by memory_format, whose strides are anybody's guess where H = W = 1.
        y = torch.empty((n, h, w, c), dtype=self.dtype, device=self.device)
        return y.permute(0, 3, 1, 2)

    def __call__(self, op: str, *arguments: Any) -> None:
        """Launches an op that writes into its last argument."""
        getattr(self._ops, op)(*arguments)


def new_workspace(like: Tensor) -> Tensor:
    """A workspace of conv_group on the device of a tensor."""
    return torch.zeros(_workspace_bytes(like.is_cuda), dtype=torch.uint8, device=like.device)


@constant_while_tracing
def _workspace_bytes(on_gpu: bool) -> int:
    ops = torch.ops.inception_ext if on_gpu else torch.ops.inception_ext_emulated
    return ops.conv_group_workspace_bytes()


class Launch(NamedTuple):
    op: Callable[..., None]
    arguments: tuple[Any, ...]


class Recorder(Launcher):
    """Collects launches, on tensors without memory."""

    def __init__(
        self, like: Tensor, dtype: torch.dtype, exact: Exact, workspace: Tensor | None
    ) -> None:
        super().__init__(like, dtype, exact, workspace)
        self.device = torch.device("meta")
        self.launches: list[Launch] = []

    def __call__(self, op: str, *arguments: Any) -> None:
        self.launches.append(Launch(getattr(self._ops, op), arguments))


class Lifetime(NamedTuple):
    """A buffer: its size, the first launch that touches it, and the last."""

    size: int
    first: int
    last: int


def place(buffers: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets in one block of memory such that no two buffers share a byte at the same time.

    The largest first, each as low as it fits: Pisarchyk and Lee, "Efficient Memory Management for
    Deep Neural Net Inference" (2020), greedy by size.

    Returns:
        the offsets, and the size of the block.
    """
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        size, first, last = buffers[i]
        rivals = [j for j in placed if buffers[j].first <= last and first <= buffers[j].last]
        for j in sorted(rivals, key=offsets.__getitem__):
            if offsets[i] + size <= offsets[j]:
                break
            offsets[i] = max(offsets[i], offsets[j] + buffers[j].size)
        placed.append(i)
    return offsets, max((o + b.size for o, b in zip(offsets, buffers, strict=True)), default=0)


_GIVEN = object()  # stands for the input of a plan


class _Result(NamedTuple):
    """Stands for (a part of) what a plan returns: a view of its one new tensor."""

    shape: Sequence[int]
    stride: Sequence[int]
    offset: int

    def of(self, y: Tensor) -> Tensor:
        return y.as_strided(self.shape, self.stride, self.offset)


class Plan:
    """The launches of some steps for one shape of their input, on memory that is settled.

    The input is read where it is, what is returned is new; everything else lies in an arena, and
    so the launches in between are always the same and can be kept as a graph.

    Args:
        recorder: with which the steps have run.
        result: what they returned.
        given: their input, a tensor without memory as well.
    """

    def __init__(self, recorder: Recorder, result: Tensor, given: Tensor) -> None:
        self._launches = recorder.launches
        self._dtype = recorder.dtype
        self._given, self._result = _storage(given), _storage(result)
        self._result_size = result.untyped_storage().nbytes() // result.element_size()
        self._returned = _view(result)

        reads = [i for i, t in self._touched() if _storage(t) == self._given]
        writes = [i for i, t in self._touched() if _storage(t) == self._result]
        # Only the launches in between see nothing of what differs from call to call.
        self._begin = max(reads) + 1
        self._end = max(self._begin, min(writes))
        self._offsets, self.size = self._place()

    def _touched(self) -> list[tuple[int, Tensor]]:
        """Each use of a tensor without memory, with the number of the launch."""
        found: list[tuple[int, Tensor]] = []
        for i, launch in enumerate(self._launches):
            _replace(launch.arguments, lambda t, i=i: found.append((i, t)))  # type: ignore[misc]
        return found

    def _place(self) -> tuple[dict[int, int], int]:
        buffers: dict[int, Lifetime] = {}
        for i, tensor in self._touched():
            storage = _storage(tensor)
            if storage in (self._given, self._result):
                continue
            size = -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
            first = buffers[storage].first if storage in buffers else i
            buffers[storage] = Lifetime(size, first, i)
        offsets, size = place(list(buffers.values()))
        return dict(zip(buffers, offsets, strict=True)), size

    def bind(self, arena: Tensor) -> None:
        """Puts the launches on memory: uint8, at least ``size`` of it."""
        memory = arena[: arena.numel() // 8 * 8].view(self._dtype)

        def settle(tensor: Tensor) -> Any:
            storage = _storage(tensor)
            if storage == self._given:
                return _GIVEN
            if storage == self._result:
                return _view(tensor)
            start = self._offsets[storage] // memory.element_size()
            return memory.as_strided(tensor.shape, tensor.stride(), start + tensor.storage_offset())

        self._launches = [
            Launch(launch.op, _replace(launch.arguments, settle)) for launch in self._launches
        ]
        self.device = arena.device

    def start(self, x: Tensor) -> Tensor:
        """Launches what reads x; returns the new tensor for :meth:`finish`."""
        y = torch.empty(self._result_size, dtype=self._dtype, device=self.device)
        for launch in self._launches[: self._begin]:
            launch.op(*_fill(launch.arguments, x, y))
        return y

    def run_settled(self) -> None:
        """Launches what lies in between."""
        for launch in self._launches[self._begin : self._end]:
            launch.op(*launch.arguments)

    def finish(self, y: Tensor) -> Tensor:
        """Launches what writes y; returns the result."""
        for launch in self._launches[self._end :]:
            launch.op(*_fill(launch.arguments, None, y))
        return self._returned.of(y)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view(tensor: Tensor) -> _Result:
    return _Result(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _replace(argument: Any, function: Callable[[Tensor], Any]) -> Any:
    """An argument with function(tensor) for each tensor without memory in it."""
    if isinstance(argument, Tensor):
        return function(argument) if argument.is_meta else argument
    if isinstance(argument, list | tuple):
        return type(argument)(_replace(part, function) for part in argument)
    return argument


def _fill(argument: Any, x: Tensor | None, y: Tensor) -> Any:
    """An argument with the tensors of a call in the places of those that stand for them."""
    if argument is _GIVEN:
        return x
    if isinstance(argument, _Result):
        return argument.of(y)
    if isinstance(argument, list | tuple):
        return type(argument)(_fill(part, x, y) for part in argument)
    return argument
