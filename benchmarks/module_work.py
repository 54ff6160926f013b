"""Parts of the network on their own: the nine Inception modules, the stem; both directions."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import peers
import torch
from decisions import settle
from devices import captured
from launches import Catch
from torch import Tensor, nn
from workload import images, torchvision_googlenet, untuned

import inception_ext
from inception_ext._frozen_cpu import FrozenCpu
from inception_ext._fuse import fold_inception
from inception_ext._launches import Exact, Launcher

__all__ = ["FORWARD", "MODULES", "STEM", "TRAINING", "ModuleWork", "decided_stem", "prepare"]

Call = Callable[[int], Any]
Factory = Callable[["ModuleWork", torch.dtype], Call]

_NAMES = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
MODULES = tuple(f"inception{name}" for name in _NAMES)
STEM = ("conv1", "maxpool1", "conv2", "conv3", "maxpool2")


@dataclass
class ModuleWork:
    """One part's weights, inputs and right answers; what scenario.run needs of a Workload.

    Args:
        name: a module's, or "stem".
        ours, theirs: the same layers in evaluation mode, from our network and torchvision's.
        network: ours, whole.
        images: float32 ``[N, C, H, W]``: what reaches the part in the network.
        references: float64, of the first input: the output, or in training also the gradients of
            the input and the parameters where the output's gradient is the output.
        margin: in training the smallest distance between what a max pool decides, see
            :func:`decisions.settle`.
    """

    name: str
    ours: nn.Module
    theirs: nn.Module
    network: nn.Module
    images: list[Tensor]
    references: Sequence[Any]
    margin: float = 0.0

    def block(self, theirs: bool, dtype: torch.dtype, training: bool = False) -> nn.Module:
        module = copy.deepcopy(self.theirs if theirs else self.ours)
        return module.to(dtype=dtype, memory_format=torch.channels_last).train(training)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(dtype).contiguous(memory_format=torch.channels_last) for x in self.images]


def prepare(
    state_dict: dict[str, Tensor],
    names: Sequence[str],
    batch: int,
    *,
    size: int = 224,
    seed: int | None = None,
    device: str = "cpu",
    training: bool = False,
) -> list[ModuleWork]:
    """The parts called ``names`` (of MODULES, or "stem") with what reaches them."""
    arguments = {"aux_logits": False, "init_weights": False}
    ours = inception_ext.googlenet(**arguments)
    theirs = torchvision_googlenet()(weights=None, **arguments)
    for model in (ours, theirs):
        model.load_state_dict(state_dict)
        model.to(device).eval()
    found: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[name] = args[0]

    for name in MODULES:
        theirs.get_submodule(name).register_forward_pre_hook(partial(keep, name))
    (pictures,) = images(batch, 1, seed=400 + batch if seed is None else seed, size=size)
    found["stem"] = pictures.to(device)
    with torch.no_grad(), untuned():
        theirs(found["stem"])
    for name in MODULES:
        theirs.get_submodule(name)._forward_pre_hooks.clear()
    works = []
    for name in names:
        parts = [_part(model, name) for model in (ours, theirs)]
        work = ModuleWork(name, *parts, ours, [found[name]], [])
        exact = work.block(theirs=True, dtype=torch.float64, training=training)
        (x,) = work.inputs(torch.float64)
        with untuned():
            if training:
                work.margin = settle(exact, x)
                shifts = {k: p for k, p in exact.named_parameters() if k.endswith("bn.bias")}
                for part in parts:
                    part.load_state_dict(shifts, strict=False)
                work.references = [_forward_backward(exact, x)]
            else:
                with torch.no_grad():
                    work.references = [exact(x)]
        works.append(work)
    return works


def decided_stem(
    state_dict: dict[str, Tensor],
    *,
    batch: int = 2,
    size: int = 33,
    seed: int = 0,
    candidates: int = 8,
    device: str = "cpu",
) -> ModuleWork:
    """The stem's training on small images for which rounding decides nothing.

    As :func:`workload.decided_workload` does with the whole network.
    """
    works = []
    for i in range(candidates):
        found = prepare(
            state_dict,
            ("stem",),
            batch,
            size=size,
            seed=1000 * seed + i,
            device=device,
            training=True,
        )
        works += found
    return max(works, key=lambda work: work.margin)


def _part(model: nn.Module, name: str) -> nn.Module:
    if name == "stem":
        return nn.Sequential(*(model.get_submodule(child) for child in STEM))
    return model.get_submodule(name)


def _forward_backward(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, then gradients of x and the parameters; the output's own value as its gradient."""
    x = x.detach().requires_grad_()
    for parameter in block.parameters():
        parameter.grad = None
    y = block(x)
    y.backward(y.detach())
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]


def ours_freeze(work: ModuleWork, dtype: torch.dtype) -> Call:
    """The part of the frozen network on the CPU."""
    inputs = work.inputs(dtype)
    if inputs[0].is_cuda:
        raise NotImplementedError("on CUDA it is a graph")
    names = STEM if work.name == "stem" else (work.name,)
    return peers._inference(
        FrozenCpu(work.network, dtype, torch.float32, names, head=False), inputs
    )


def ours_freeze_graph(work: ModuleWork, dtype: torch.dtype) -> Call:
    """The launches of the frozen network that stand for the part, in a CUDA graph."""
    (x,) = work.inputs(dtype)
    if not x.is_cuda:
        raise NotImplementedError("its launches are for CUDA")
    if work.name == "stem":
        with Catch() as caught:
            inception_ext.freeze(work.network, dtype=dtype)(x)
        launches = [launch for launch in caught.launches if launch.name.startswith("stem_")]

        def run() -> Any:
            for launch in launches:
                launch()
            return launches[-1].arguments[-1]
    else:
        step = fold_inception(work.ours, dtype)
        launcher = Launcher(x, dtype, Exact.by_torch(dtype))

        def run() -> Any:
            return step(launcher, x)

    with torch.no_grad():
        replay, result = captured(run)

    def call(i: int) -> Any:
        replay()
        return result

    return call


def _forward(theirs: bool, compiled: bool, work: ModuleWork, dtype: torch.dtype) -> Call:
    module: Any = work.block(theirs, dtype)
    if compiled:
        torch._dynamo.reset()
        module = torch.compile(module, dynamic=False, fullgraph=True)
    return peers._inference(module, work.inputs(dtype))


def _graph(factory: Factory, work: ModuleWork, dtype: torch.dtype) -> Call:
    replay, result = captured(partial(factory(work, dtype), 0))

    def call(i: int) -> Any:
        replay()
        return result

    return call


def _train(theirs: bool, compiled: bool, work: ModuleWork, dtype: torch.dtype) -> Call:
    module: Any = work.block(theirs, torch.float32, training=True)
    (x,) = work.inputs(torch.float32)
    run = module
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(module, dynamic=False, fullgraph=True)

    def call(i: int) -> Any:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return _forward_backward(run, x)

    return call


FORWARD: dict[str, Factory] = {
    "ours freeze": ours_freeze,
    "ours freeze, CUDA graph": ours_freeze_graph,
    "ours eval": partial(_forward, False, False),
    peers.BASELINE: partial(_forward, True, False),
    "eager CUDA graph": partial(_graph, partial(_forward, True, False)),
    "compile": partial(_forward, True, True),
    "compile CUDA graph": partial(_graph, partial(_forward, True, True)),
}
TRAINING: dict[str, Factory] = {
    "ours": partial(_train, False, False),
    peers.BASELINE: partial(_train, True, False),
    "compile": partial(_train, True, True),
}
