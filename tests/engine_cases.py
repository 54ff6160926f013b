"""What the tests of freeze() share: models of each kind, images, and the verdict on logits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from closeness import assert_network_as_good_as_eager
from fast_path import generator
from kernel_devices import kernels_on, torch_device
from torch import Tensor, nn

import inception_ext
from inception_ext import functional
from inception_ext.bvlc import BVLCGoogLeNet
from inception_ext.engine import Engine, freeze

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def enliven(model: nn.Module) -> nn.Module:
    """Every layer passes a signal on, in evaluation mode too."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.uniform_(module.bias, 0.4, 0.8)
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    return model.eval()


def make_models(tv_googlenet: Any) -> dict[str, nn.Module]:
    """One of each kind, in evaluation mode."""
    settings = {"num_classes": 10, "init_weights": False}
    torch.manual_seed(0)
    return {
        "ours": enliven(inception_ext.GoogLeNet(**settings)),
        "torchvision": enliven(tv_googlenet.GoogLeNet(**settings)),
        "accelerated": inception_ext.accelerate(enliven(tv_googlenet.GoogLeNet(**settings))),
        "branch3_kernel_size=5": enliven(
            inception_ext.GoogLeNet(**settings, aux_logits=False, branch3_kernel_size=5)
        ),
        "bvlc": enliven(BVLCGoogLeNet(num_classes=10)),
    }


KINDS = ("ours", "torchvision", "accelerated", "branch3_kernel_size=5", "bvlc")


def images(n: int, h: int, w: int, seed: int = 1) -> Tensor:
    """uint8, as they come from a file."""
    return torch.randint(0, 256, (n, 3, h, w), generator=generator(seed), dtype=torch.uint8)


def normalised(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    return (x.to(dtype) / 255 - mean) / std


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    """In evaluation mode, on the plain path, in the dtype of x."""
    model = copy.deepcopy(model).to(x.dtype).eval()
    with torch.no_grad(), functional.use_kernels(False):
        return model(x)


def assert_as_good_as_the_model(
    engine: Engine, model: nn.Module, x: Tensor, given: Tensor | None = None
) -> None:
    """The engine on ``given`` (default: x) against the model on x, judged in float64."""
    assert_logits_as_good_as_the_models(engine(x if given is None else given), model, x)


def assert_logits_as_good_as_the_models(logits: Tensor, model: nn.Module, x: Tensor) -> None:
    """The same for logits that are there already."""
    exact = evaluate(model, x.double())
    if logits.dtype != torch.float32 and isinstance(model, BVLCGoogLeNet):
        eager = exact.to(logits.dtype)  # the best there could be: torch's LRN on the CPU lacks it
    else:
        eager = evaluate(model, x.to(logits.dtype))
    assert_network_as_good_as_eager({"logits": logits}, {"logits": eager}, {"logits": exact})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "nhwc": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "nhwc view": lambda x: x.permute(0, 2, 3, 1),
    "flipped": lambda x: x.flip(3).contiguous().flip(3),
    "sliced": lambda x: torch.cat([x, x, x], 3)[..., x.shape[3] : 2 * x.shape[3]],
    "every other": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
}


def to_device(x: Tensor, device: str) -> Tensor:
    """With its strides."""
    if torch_device(device) == "cpu":
        return x
    y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=torch_device(device))
    return y.copy_(x)


class OnCPU:
    """An engine on any device, for tensors of the CPU."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: str) -> None:
        self.device = device
        self.model = copy.deepcopy(model).to(torch_device(device))
        with kernels_on(device, counting=False):
            self.engine = freeze(self.model, dtype)
        self.dtype = self.engine.dtype

    def __call__(self, x: Tensor) -> Tensor:
        with kernels_on(self.device):
            return self.engine(to_device(x, self.device)).cpu()
