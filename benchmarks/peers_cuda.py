"""The contestants on a GPU: each factory returns ``call(i)``, or raises with the reason against it.

As in ``peers.py``, all get channels_last and inputs that are ready in memory. "CUDA graph" in a
name means that the whole call is one graph, captured for each input.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import peers
import runtimes
import torch
from devices import captured
from folded import Folded, cudnn_frontend, cudnn_relu
from workload import Workload, torchvision_googlenet

__all__ = ["INFERENCE", "baseline", "graphed"]

Call = Callable[[int], Any]
Factory = peers.Factory

baseline = peers.BASELINE


def graphed(factory: Factory) -> Factory:
    """The contestant that replays what another one does."""

    def make(work: Workload, dtype: torch.dtype) -> Call:
        call = factory(work, dtype)
        replays = [captured(partial(call, i)) for i in range(len(work.images))]

        def replay(i: int) -> Any:
            run, result = replays[i]
            run()
            return result

        return replay

    return make


def autocast(work: Workload, dtype: torch.dtype) -> Call:
    model = work.model(torchvision_googlenet()).to(memory_format=torch.channels_last)
    inputs = peers._channels_last(work, torch.float32)

    def call(i: int) -> Any:
        with torch.inference_mode(), torch.autocast(inputs[i].device.type, dtype):
            return model(inputs[i])

    return call


class Compiled:
    """torchvision's model under ``torch.compile`` with some options.

    Contestants of one scenario share what is compiled, and the next scenario's start afresh: torch
    gives up on a network that it has compiled too often.
    """

    _work: Workload | None = None
    _calls: ClassVar[dict[Any, Call]] = {}

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, work: Workload, dtype: torch.dtype) -> Call:
        if Compiled._work is not work:
            torch._dynamo.reset()
            Compiled._work, Compiled._calls = work, {}
        key = (dtype, *self.options.items())
        if key not in Compiled._calls:
            model = work.model(torchvision_googlenet())
            model = model.to(dtype=dtype, memory_format=torch.channels_last)
            run = torch.compile(model, dynamic=False, fullgraph=True, options=self.options)
            Compiled._calls[key] = partial(_without_grad, run, peers._channels_last(work, dtype))
        return Compiled._calls[key]


def _without_grad(run: Callable[[torch.Tensor], Any], inputs: list[torch.Tensor], i: int) -> Any:
    with torch.no_grad():  # freezing is skipped in inference mode
        return run(inputs[i])


def folded(make: Callable[[], Any]) -> Factory:
    """torchvision's network with batch norms folded, its convolutions + bias + ReLU by another."""

    def factory(work: Workload, dtype: torch.dtype) -> Call:
        if not work.images[0].is_cuda:
            raise NotImplementedError("cuDNN needs a GPU")
        network = Folded(work.model(torchvision_googlenet()), dtype, make())
        return peers._inference(network, peers._channels_last(work, dtype))

    return factory


_default = Compiled()
_autotuned = Compiled(max_autotune=True, coordinate_descent_tuning=True, freezing=True)

INFERENCE: dict[str, Factory] = {
    "ours freeze": peers.ours_freeze,
    "ours freeze, CUDA graph": graphed(peers.ours_freeze),
    "ours eval": peers.ours_eval,
    "eager": peers.eager,
    baseline: peers.eager_channels_last,
    "eager autocast": autocast,
    "eager CUDA graph": graphed(peers.eager_channels_last),
    "cuDNN conv+bias+ReLU, CUDA graph": graphed(folded(cudnn_relu)),
    "cudnn-frontend, CUDA graph": graphed(folded(cudnn_frontend)),
    "compile": _default,
    "compile CUDA graph": graphed(_default),
    "compile max-autotune frozen, CUDA graph": graphed(_autotuned),
    "tensorrt": runtimes.tensorrt,
    "onnxruntime": runtimes.onnxruntime_cuda,
    "openvino": runtimes.openvino_cuda,
}
