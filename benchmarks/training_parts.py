"""Contestants of a training step: its forward pass, its backward pass, both, and the whole of it.

Both heads, no dropout; 16-bit dtypes mean autocast over float32 weights, and float16 a loss that is
scaled by a constant. All get channels_last.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import peers
import torch
from peers_cuda import graphed
from torch import Tensor, nn
from workload import Workload, torchvision_googlenet

import inception_ext

__all__ = ["PARTS", "contestants", "work_of"]

# The kind of each part's scenario; what the parts do is Training's methods.
PARTS = {
    "step": "training step",
    "forward": "training forward",
    "backward": "training backward",
    "whole": "training step with optimizer",
}
SCALE = 1024.0  # of the loss in float16: a gradient of a mean over 256 images is small


class Training:
    """A network, its inputs, and the parts of a step as ``call(i)``.

    Args:
        network: the modules; ``run`` is what calls them, such as the same one compiled.
    """

    def __init__(
        self,
        work: Workload,
        dtype: torch.dtype,
        network: nn.Module,
        run: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.inputs = [x.contiguous(memory_format=torch.channels_last) for x in work.images]
        self.labels, self.dtype = work.labels, dtype
        self.run = run or network
        self.parameters = list(network.parameters())
        self.criterion = inception_ext.GoogLeNetLoss()
        self.scale = SCALE if dtype == torch.float16 else 1.0
        # So small a rate that inputs and gradients stay what they are.
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-9, momentum=0.9, weight_decay=1e-4)
        self.graphs: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(self, i: int) -> tuple[Tensor, Tensor]:
        """The loss, and what is differentiated."""
        images = self.inputs[i]
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.criterion(self.run(images), self.labels[i])
        return loss, loss * self.scale if self.scale != 1 else loss

    def forward(self, i: int) -> list[Tensor]:
        return [self.loss(i)[0].detach()]

    def backward(self, i: int) -> list[Tensor]:
        """Over a forward pass that was made once."""
        if i not in self.graphs:
            self.graphs[i] = self.loss(i)
        loss, scaled = self.graphs[i]
        gradients = torch.autograd.grad(scaled, self.parameters, retain_graph=True)
        return [loss.detach(), *self.unscaled(list(gradients))]

    def step(self, i: int) -> list[Tensor]:
        for p in self.parameters:
            p.grad = None
        loss, scaled = self.loss(i)
        scaled.backward()
        return [loss.detach(), *self.unscaled([p.grad for p in self.parameters])]

    def whole(self, i: int) -> list[Tensor]:
        results = self.step(i)
        self.optimizer.step()
        return results

    def unscaled(self, gradients: list[Any]) -> list[Tensor]:
        if self.scale != 1:
            torch._foreach_mul_(gradients, 1 / self.scale)
        return gradients


def _network(work: Workload, build: Callable[..., nn.Module]) -> nn.Module:
    return work.model(build).to(memory_format=torch.channels_last)


def _ours(work: Workload, dtype: torch.dtype) -> Training:
    return Training(work, dtype, _network(work, inception_ext.googlenet))


def _eager(work: Workload, dtype: torch.dtype) -> Training:
    return Training(work, dtype, _network(work, torchvision_googlenet()))


class _Compiled:
    """torchvision's network under ``torch.compile``; the parts of a step share what is compiled."""

    _images: Any = None
    _made: ClassVar[dict[torch.dtype, Training]] = {}

    def __call__(self, work: Workload, dtype: torch.dtype) -> Training:
        if _Compiled._images is not work.images:
            torch._dynamo.reset()
            _Compiled._images, _Compiled._made = work.images, {}
        if dtype not in _Compiled._made:
            network = _network(work, torchvision_googlenet())
            # A backward that runs twice over one forward needs all that was saved.
            with torch._functorch.config.patch(donated_buffer=False):
                run = torch.compile(network, dynamic=False, fullgraph=True)
                training = Training(work, dtype, network, run)
                training.step(0)
            _Compiled._made[dtype] = training
        return _Compiled._made[dtype]


Maker = Callable[[Workload, torch.dtype], Training]
_MAKERS: Mapping[str, Maker] = {"ours": _ours, peers.BASELINE: _eager, "compile": _Compiled()}
_GRAPHED = {"ours": "ours, CUDA graph", peers.BASELINE: "eager CUDA graph"}


def _call(make: Maker, part: str, work: Workload, dtype: torch.dtype) -> peers.Call:
    call: peers.Call = getattr(make(work, dtype), part)
    return call


def contestants(
    part: str, *, graphs: bool = True, compiled: bool = True
) -> dict[str, peers.Factory]:
    """Who takes part in one of PARTS.

    Args:
        graphs: whether calls in one CUDA graph do.
        compiled: whether ``torch.compile`` does.
    """
    factories: dict[str, peers.Factory] = {}
    for name, make in _MAKERS.items():
        if name == "compile" and not compiled:
            continue
        factories[name] = partial(_call, make, part)
        if graphs and name in _GRAPHED and part != "backward":
            factories[_GRAPHED[name]] = graphed(factories[name])
    return factories


def work_of(part: str, work: Workload) -> Workload:
    """A training workload with what the calls of one of PARTS return."""
    if part != "forward":
        return work
    return replace(work, references=[reference[:1] for reference in work.references])
