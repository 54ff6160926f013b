"""The network as plain eager PyTorch, to compare with."""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from inception_ext.functional import use_kernels
from inception_ext.googlenet import GoogLeNet

__all__ = ["eager_twin"]


def eager_twin(model: GoogLeNet) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The same network in eval mode without any of our kernels, with the same weights.

    Returns:
        what it is, and a function from ``[N, 3, H, W]`` to logits ``[N, num_classes]``:
        torchvision's own model where torchvision can be imported, otherwise ours with the kernels
        turned off.
    """
    try:
        twin: nn.Module = _torchvision_twin(model)
        name = "torchvision, eager"
    except ImportError:
        twin = copy.deepcopy(model)
        name = "the reference path, eager"
    twin.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def call(images: Tensor) -> Tensor:
        with torch.inference_mode(), use_kernels(False):
            logits: Tensor = twin(images)
            return logits

    return name, call


def _torchvision_twin(model: GoogLeNet) -> nn.Module:
    from inception_ext._torchvision import import_torchvision

    torchvision = import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin: nn.Module = torchvision.models.googlenet(
            weights=None,
            num_classes=model.fc.out_features,
            aux_logits=model.aux1 is not None,
            transform_input=model.transform_input,
            init_weights=False,
        )
    twin.load_state_dict(model.state_dict())
    parameter = next(model.parameters())
    return twin.to(dtype=parameter.dtype)
