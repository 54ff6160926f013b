"""Where calls are timed: on the CPU by the wall clock, on a GPU by the device's own events."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["Cuda", "Device", "Host", "captured", "device_for", "saved_bytes"]

T = TypeVar("T")


class Device(Protocol):
    """What benchmarks need of a device."""

    type: str

    def seconds(self, call: Callable[[], Any], *, cold: bool = False) -> float:
        """The time of one call; ``cold``: nothing of what it reads is in the L2 cache."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most memory that a call had allocated at one time, on top of what was there before."""

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""


def device_for(name: str) -> Device:
    """``cpu``, ``cuda``, or ``auto``: a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return Cuda() if name == "cuda" else Host()


class Host:
    """The CPU; what is in its caches is left to chance."""

    type = "cpu"

    def seconds(self, call: Callable[[], Any], *, cold: bool = False) -> float:
        if cold:
            raise NotImplementedError("only a GPU's L2 cache can be emptied here")
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """By torch's allocator; None where a call allocates nothing there, as other runtimes do."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        profile = torch.profiler.profile(activities=activities, profile_memory=True)
        with _no_messages(), profile as profiler:
            call()
        results: Any = profiler.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        now = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        return peak or None

    def synchronize(self) -> None:
        pass


class Cuda:
    """The current GPU. Times are those between two events around the call, on an idle device."""

    type = "cuda"

    def __init__(self) -> None:
        torch.backends.cudnn.benchmark = True  # cuDNN's users are advised to
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        l2 = getattr(properties, "L2_cache_size", 0)
        self._evict = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Callable[[], Any], *, cold: bool = False) -> float:
        if cold:
            # Takes some 0.1 ms, in which the host is ahead of the device by a few launches.
            self._evict.zero_()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def synchronize(self) -> None:
        torch.cuda.synchronize()


@contextmanager
def _no_messages() -> Iterator[None]:
    """Keeps from the terminal what the profiler's C++ code writes to it."""
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def saved_bytes(call: Callable[[], Any]) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters apart, each once."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        is_parameter = tensor.is_leaf and tensor.requires_grad
        if not is_parameter:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def captured(call: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A call as a CUDA graph: its replay, and what the call returned, which replays fill anew."""
    if not torch.cuda.is_available():
        raise NotImplementedError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # loads kernels, chooses algorithms, fills caches of packed weights
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result
