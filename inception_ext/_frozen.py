"""A frozen network as a list of steps, in PyTorch operations; on the CPU with oneDNN's fused ones.

A step that is known (convolution + batch norm + ReLU, an Inception module, a pool) runs fused; a
module that is not (a replaced classifier, a block with hooks) is called as it is.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext._fold import fold, is_foldable, is_inception, is_plain
from inception_ext._layers import max_pool

__all__ = [
    "BODY",
    "STEM",
    "Convolution",
    "Frozen",
    "Inception",
    "ModuleCall",
    "Pool",
    "has_fused_convolution",
    "run",
    "run_in_slices",
]

# Children in the order of their calls; a network without one (only the paper's has lrn) skips it.
STEM: tuple[str, ...] = ("conv1", "maxpool1", "lrn1", "conv2", "conv3", "lrn2", "maxpool2")
BODY: tuple[str, ...] = (
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)

Step = Callable[[Tensor], Tensor]
_Dtypes = tuple[torch.dtype, torch.dtype]

# Large batches run in slices, whose largest activation has at most this many bytes. malloc asks the
# system for every block beyond 32 MiB anew, and each of its pages faults: a third of the time of a
# batch of 32. The stem's slices stay within a shared cache besides.
_STEM_BYTES = 8 << 20
_BODY_BYTES = 32 << 20


class Frozen:
    """The network in evaluation mode: ``[N, 3, H, W]`` -> logits ``[N, num_classes]``.

    Args:
        model: a GoogLeNet.
        dtype: of the computation; x has it, and the logits.
        model_dtype: of the model's weights, for modules without parameters.
        names: which children, one after the other; x is what the first of them reads.
        head: whether pool and classifier follow.
    """

    reads_images = False  # but their normalised pixels

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        model_dtype: torch.dtype,
        names: Sequence[str] = (*STEM, *BODY),
        head: bool = True,
    ) -> None:
        dtypes = (dtype, model_dtype)
        self.stem, self.body = (
            [
                _step(getattr(model, name), dtypes)
                for name in names
                if name in part and hasattr(model, name)
            ]
            for part in (STEM, BODY)
        )
        self.head = _head(model, dtypes) if head else []

    def __call__(self, x: Tensor) -> Tensor:
        # One channel of an image. The stem's largest activation has 64 channels of a quarter
        # of its pixels, the body's 480 of a 64th.
        plane = x.element_size() * x.shape[2] * x.shape[3]
        x = self.run_part(self.stem, x, max(1, _STEM_BYTES // max(1, 16 * plane)))
        x = self.run_part(self.body, x, max(1, _BODY_BYTES // max(1, 8 * plane)))
        return run(self.head, x)

    def run_part(self, steps: list[Step], x: Tensor, images: int) -> Tensor:
        """Stem or body, in slices of at most so many images where that is possible."""
        return run_in_slices(steps, x, images)

    def count_fused(self) -> tuple[int, int]:
        """How many of the steps before the head are fused, and of how many."""
        steps = (*self.stem, *self.body)
        return sum(not isinstance(step, ModuleCall) for step in steps), len(steps)


def run(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def run_in_slices(steps: Sequence[Step], x: Tensor, images: int) -> Tensor:
    """Runs steps on slices of at most ``images`` images, where all are ours and on the CPU."""
    if not steps:
        return x
    n = x.shape[0]
    slices = -(-n // images)
    if slices <= 1 or x.device.type != "cpu" or any(isinstance(s, ModuleCall) for s in steps):
        return run(steps, x)
    return torch.cat([run(steps, part) for part in x.split(-(-n // slices))])


class ModuleCall:
    """A module that no fused step stands for: called as in evaluation mode, in its own dtype.

    Args:
        dtypes: that of the engine, and that of the model, for modules without parameters.
    """

    def __init__(self, module: nn.Module, dtypes: "_Dtypes") -> None:
        self.module = module
        self.dtype, model_dtype = dtypes
        parameter = next(module.parameters(), None)
        self.module_dtype = model_dtype if parameter is None else parameter.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return _call(self.module, x.to(self.module_dtype)).to(self.dtype)


_mode_lock = threading.RLock()


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """Calls a module in evaluation mode and leaves every mode in it as it was."""
    with _mode_lock:  # no other thread puts a mode back in the middle
        training = [m for m in module.modules() if m.training]
        for m in training:
            m.training = False
        try:
            return module(x)
        finally:
            for m in training:
                m.training = True


# oneDNN's ReLU is max(x, 0), which makes 0 of NaN: a broken image, or a model that has diverged,
# would get logits like any other. Its leaky ReLU multiplies, and keeps NaN. This slope is as good
# as 0, and yet far from where numbers become subnormal, which is slow.
_SLOPE = 1e-30


class Convolution:
    """Convolution + bias + ReLU, weights packed for the first shape that comes.

    Args:
        weight: ``[K, C, R, S]`` float32; bias: ``[K]`` float32.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dtype: torch.dtype,
    ) -> None:
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = bias.to(dtype)
        self.stride, self.padding = list(stride), list(padding)
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0 or not has_fused_convolution(x):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, [1, 1], 1, list(x.shape)
            )
        leaky = ("leaky_relu", [_SLOPE], None)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, self.padding, self.stride, [1, 1], 1, *leaky
        )


def has_fused_convolution(x: Tensor) -> bool:
    """oneDNN's fused convolution is a private operator of torch, and may be missing."""
    return bool(
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class Pool:
    """Max pool as a module has it."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return max_pool(self.module, x)


class Inception:
    """An Inception module: merged 1x1, two convolutions, pool and projection, into one output."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        b1, b2, b3, b4 = block.branch1, block.branch2, block.branch3, block.branch4
        folded = [fold(conv) for conv in (b1, b2[0], b3[0])]
        self.split = [weight.shape[0] for weight, _ in folded]
        self.merged = Convolution(
            torch.cat([weight for weight, _ in folded]),
            torch.cat([bias for _, bias in folded]),
            (1, 1),
            (0, 0),
            dtype,
        )
        self.conv_3x3 = _fused_convolution(b2[1], dtype)
        self.conv_5x5 = _fused_convolution(b3[1], dtype)
        self.pool = Pool(b4[0])
        self.projection = _fused_convolution(b4[1], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # [N, K1 + K3red + K5red, H, W]: all that reads x
        y1, y3, y5 = self.merged(x).split(self.split, 1)
        y_pool = self.projection(self.pool(x))
        return torch.cat([y1, self.conv_3x3(y3), self.conv_5x5(y5), y_pool], 1)


def _step(module: nn.Module, dtypes: _Dtypes) -> Step:
    """The fused step that stands for a module, or a call of the module."""
    if is_foldable(module):
        return _fused_convolution(module, dtypes[0])
    if is_inception(module):
        return Inception(module, dtypes[0])
    if is_plain(module, nn.MaxPool2d):
        return Pool(module)
    return ModuleCall(module, dtypes)


def _head(model: Any, dtypes: _Dtypes) -> list[Step]:
    """Pool, dropout, classifier: ``[N, 1024, H, W]`` -> ``[N, num_classes]``."""
    pool = model.avgpool
    steps = [pool if is_plain(pool, nn.AdaptiveAvgPool2d) else ModuleCall(pool, dtypes)]
    steps.append(lambda x: torch.flatten(x, 1))
    dropout = getattr(model, "dropout", None)
    if isinstance(dropout, nn.Module) and not is_plain(dropout, nn.Dropout):
        steps.append(ModuleCall(dropout, dtypes))
    return [*steps, _classifier(model.fc, dtypes)]


def _classifier(module: Any, dtypes: _Dtypes) -> Step:
    if not is_plain(module, nn.Linear):
        return ModuleCall(module, dtypes)
    weight = module.weight.to(dtypes[0])
    bias = None if module.bias is None else module.bias.to(dtypes[0])
    return lambda x: F.linear(x, weight, bias)


def _fused_convolution(block: Any, dtype: torch.dtype) -> Convolution:
    weight, bias = fold(block)
    return Convolution(weight, bias, block.conv.stride, block.conv.padding, dtype)
