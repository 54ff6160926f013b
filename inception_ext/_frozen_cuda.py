"""A frozen network as launches of the inference kernels.

The steps that are known follow one another in segments; between them, a module that is not known is
called as it is. For each shape of its input a segment is planned once: the launches, and where in
one block of memory their tensors lie. On a GPU the launches become a CUDA graph, except for those
that read the images and write the logits: the first are read where they are, the second are new.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inception_ext import _library
from inception_ext._fold import is_plain
from inception_ext._frozen import BODY, STEM, ModuleCall
from inception_ext._fuse import classifier, fused_step
from inception_ext._images import Images
from inception_ext._launches import Exact, Launcher, Plan, Recorder, new_workspace
from inception_ext._profiling import region
from inception_ext._steps import Step

__all__ = ["FusedNetwork"]

# How much is kept for later calls: shapes of the input for each stream, and streams.
_MAX_PLANS = 32
_MAX_STREAMS = 4

T = TypeVar("T")


class FusedNetwork:
    """The network in evaluation mode: images -> logits ``[N, num_classes]``.

    Args:
        model: a GoogLeNet.
        dtype: of the computation and the logits.
        model_dtype: of the model's weights, for modules without parameters.
        names: which children, one after the other; without conv1, an activation comes in.
        head: whether pool and classifier follow.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        model_dtype: torch.dtype,
        names: Sequence[str] = (*STEM, *BODY),
        head: bool = True,
    ) -> None:
        self.reads_images = "conv1" in names
        self.dtype = dtype
        self._fused = self._total = 0
        self._parts: list[_Segment | Callable[[Any], Tensor]] = []
        dtypes = (dtype, model_dtype)
        self._add_all({n: getattr(model, n) for n in names if hasattr(model, n)}, dtypes)
        if head:
            self._add_head(model, dtypes)
        device = next(model.parameters()).device
        if device.type == "cuda" and not _is_capturing(device):
            # Later calls may be on other streams, and kernels fetch weights ahead of their turn.
            torch.cuda.synchronize(device)
        self._lock = threading.Lock()
        self._streams: _Recent[_Stream] = _Recent(_MAX_STREAMS)

    def _add_all(self, children: dict[str, nn.Module], dtypes: Any) -> None:
        names = list(children)
        self._total = len(names)
        while names:
            first = self.reads_images and not self._parts
            for count in (3, 2, 1):
                modules = [children[name] for name in names[:count]]
                step = fused_step(modules, first, self.dtype) if len(modules) == count else None
                if step is not None:
                    self._add(" + ".join(names[:count]), step)
                    self._fused += count
                    break
            if step is None and first:  # no kernel reads these images
                self._parts.append(self._load)
                continue
            if step is None:
                self._parts.append(ModuleCall(modules[0], dtypes))
            del names[:count]

    def _load(self, images: Images) -> Tensor:
        return images.to_nhwc(self.dtype)

    def _add_head(self, model: Any, dtypes: Any) -> None:
        """Pool, dropout, classifier: ``[N, 1024, H, W]`` -> ``[N, num_classes]``."""
        pool = fused_step([model.avgpool], False, self.dtype)
        if pool is None:
            self._parts.append(ModuleCall(model.avgpool, dtypes))
        else:
            self._add("avgpool", pool)
        dropout: Any = getattr(model, "dropout", None)
        calls_dropout = isinstance(dropout, nn.Module) and not is_plain(dropout, nn.Dropout)
        linear = classifier(model.fc, self.dtype)
        if pool is None or calls_dropout or linear is None:
            self._parts.append(lambda x: torch.flatten(x, 1))
        if calls_dropout:
            self._parts.append(ModuleCall(dropout, dtypes))
        if linear is None:
            self._parts.append(ModuleCall(model.fc, dtypes))
            return
        if not isinstance(self._parts[-1], _Segment):
            self._parts.append(lambda x: x[:, :, None, None])
        self._add("fc", linear)

    def _add(self, name: str, step: Step) -> None:
        if not (self._parts and isinstance(self._parts[-1], _Segment)):
            self._parts.append(_Segment())
        self._parts[-1].append((name, step))  # type: ignore[union-attr]

    def count_fused(self) -> tuple[int, int]:
        """How many of the modules before the head are fused, and of how many."""
        return self._fused, self._total

    @property
    def is_whole(self) -> bool:
        """Whether kernels stand for all modules, and none is called."""
        return len(self._parts) == 1 and isinstance(self._parts[0], _Segment)

    def name_launches(self, images: Images) -> list[str]:
        """The modules that each launch stands for, in order; no module is called.

        Raises:
            ValueError: a module is not fused.
        """
        if not self.is_whole:
            raise ValueError("a network with modules that no kernel stands for")
        recorder = Recorder(images.pixels, self.dtype, Exact.by_torch(self.dtype), None)
        x: Any = images._replace(pixels=images.pixels.to("meta"))
        names: list[str] = []
        (segment,) = self._parts
        assert isinstance(segment, _Segment)
        for name, step in segment:
            x = step(recorder, x)
            names += [name] * (len(recorder.launches) - len(names))
        return names

    def __call__(self, images: Images | Tensor) -> Tensor:
        x: Any = images
        pixels = images.pixels if isinstance(images, Images) else images
        if isinstance(images, Images) and pixels.dtype == torch.float64:
            x = images._replace(pixels=pixels.float())
        exact = Exact.by_torch(self.dtype)
        if pixels.shape[0] == 0 or _needs_tensors_of_its_own(pixels):
            launcher = Launcher(pixels, self.dtype, exact)
            for part in self._parts:
                x = part.run(launcher, x) if isinstance(part, _Segment) else part(x)
            return x
        with _on_device(pixels):
            for i, part in enumerate(self._parts):
                x = self._planned(i, part, x, exact) if isinstance(part, _Segment) else part(x)
        return x

    def _planned(self, index: int, segment: "_Segment", x: Any, exact: Exact) -> Tensor:
        """Runs a segment by its plan; one call at a time, for they share their memory."""
        tensor = x.pixels if isinstance(x, Images) else x
        affine = x[1:] if isinstance(x, Images) else ()
        with self._lock:
            stream = self._streams.get_or_make(_stream_of(tensor), lambda: _Stream(tensor))
            key = (index, tensor.shape, affine, exact, _library.ops(tensor))
            plan = stream.plans.get_or_make(
                key, lambda: stream.plan(segment, x, tensor, exact, self.dtype)
            )
            return plan(tensor)


def _needs_tensors_of_its_own(x: Tensor) -> bool:
    """Whether somebody else records what runs: then memory and launches are theirs to plan."""
    return torch.compiler.is_compiling() or (x.is_cuda and _is_capturing(x.device))


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _on_device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _stream_of(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


class _Segment(list[tuple[str, Step]]):
    """Steps of which each reads what the one before wrote, with the names of their modules."""

    def run(self, launcher: Launcher, x: Any) -> Tensor:
        for _, step in self:
            x = step(launcher, x)
        return x


class _Stream:
    """What is kept for the calls on one stream: a block of memory, and the plans that use it."""

    def __init__(self, like: Tensor) -> None:
        self.plans: _Recent[_Replayed] = _Recent(_MAX_PLANS)
        with torch.inference_mode(False):
            self._arena = torch.empty(0, dtype=torch.uint8, device=like.device)
            self._workspace = new_workspace(like)

    def plan(
        self, segment: _Segment, x: Any, tensor: Tensor, exact: Exact, dtype: torch.dtype
    ) -> "_Replayed":
        """The plan of a segment for inputs like x, in whose place or in which is the tensor."""
        with torch.inference_mode(False), torch.no_grad():
            given = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            given_x = x._replace(pixels=given) if isinstance(x, Images) else given
            recorder = Recorder(tensor, dtype, exact, self._workspace)
            plan = Plan(recorder, segment.run(recorder, given_x), given)
            if plan.size > self._arena.numel():
                self.plans.clear()  # they lie in the smaller block
                self._arena = torch.empty(plan.size, dtype=torch.uint8, device=tensor.device)
            plan.bind(self._arena)
        return _Replayed(plan)


class _Replayed:
    """A plan whose settled launches are a CUDA graph from the second call on.

    The first call loads the kernels, which must not happen while a graph is captured.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self._plan.start(x)
        if self._called and self._graph is None and x.is_cuda:
            self._graph = _capture(self._plan)
        if self._graph is None:
            self._plan.run_settled()
        else:
            with region("graph"):
                self._graph.replay()
        self._called = True
        return self._plan.finish(y)


def _capture(plan: Plan) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
        plan.run_settled()
        graph.capture_end()
    return graph


class _Recent(OrderedDict[Any, T]):
    """The entries that were used last, at most ``limit`` of them."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def get_or_make(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self:
            self[key] = make()
            if len(self) > self._limit:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]
