"""Frozen inference: batch norms folded, 1x1 convolutions merged, weights packed once.

:func:`freeze` reads a GoogLeNet (ours, torchvision's, or the paper's) into a list of steps. A
step that it knows (convolution + batch norm + ReLU, an Inception module, a pool) runs fused; a
module that it does not know (a replaced classifier, a block with hooks) is called as it is. So a
frozen model always computes what the model computes in evaluation mode.
"""

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from inception_ext import functional
from inception_ext.modules import max_pool

__all__ = ["Engine", "freeze"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CPU_DTYPES = (torch.float32, torch.bfloat16)

# Children in the order of their calls; a network without one (only the paper's has lrn) skips it.
_STEM = ("conv1", "maxpool1", "lrn1", "conv2", "conv3", "lrn2", "maxpool2")
_BODY = (
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)


def freeze(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> "Engine":
    """A fast inference-only view of a GoogLeNet, whatever mode the model is in.

    The model stays as it is and remains the owner of the weights: when a parameter, a statistic or
    a submodule changes (training, ``load_state_dict``, ``.to()``, a new ``fc``), the next call
    folds and packs them anew. What torch keeps no count of it cannot notice: after
    ``p.data.mul_(2)``, or writes from another process, call :meth:`Engine.refresh`.

    Args:
        model: :class:`inception_ext.GoogLeNet`, torchvision's, or a network with their children.
        dtype: of the computation and of the logits; default: that of the model. float32 or
            bfloat16 on the CPU, also float16 on CUDA.
        mean, std: per channel; uint8 images are brought to ``(x / 255 - mean) / std``, as the
            transforms that come with the published weights do. Float images are used as they are.

    Returns:
        an :class:`Engine`: ``engine(images) -> logits``.

    Raises:
        TypeError: the model lacks the children of a GoogLeNet.
        ValueError: a dtype that inference does not run in, ``mean`` or ``std`` of another length
            than 3, or a ``std`` that is not positive.
    """
    return Engine(model, dtype, mean, std)


class Engine:
    """What :func:`freeze` returns. Safe to call from several threads once warmed up."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise TypeError("freeze: model: expected a GoogLeNet, got a scripted or traced one")
        missing = [
            name
            for name in (*_STEM, *_BODY, "avgpool", "fc")
            if not name.startswith("lrn") and not isinstance(getattr(model, name, None), nn.Module)
        ]
        if missing:
            is_wrapper = isinstance(getattr(model, "module", None), nn.Module)
            raise TypeError(
                f"freeze: model: expected a GoogLeNet, got a {type(model).__name__} without "
                + ("its children; pass its .module" if is_wrapper else ", ".join(missing))
            )
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"freeze: mean and std: expected 3 values each, got {len(mean)} and {len(std)}"
            )
        if not min(std) > 0:
            raise ValueError(f"freeze: std: expected values above 0, got {tuple(std)}")
        self.model = model
        self._asked_dtype = dtype
        self._mean, self._std = tuple(mean), tuple(std)
        self._watch: _Watch | None = None
        self.refresh()

    def refresh(self) -> None:
        """Reads the model's weights as they are now; a call does it where it notices a change."""
        watch = _Watch(self.model)
        weight = next(self.model.parameters())
        self.device = weight.device
        self.dtype = self._asked_dtype or weight.dtype
        supported = _CPU_DTYPES if self.device.type == "cpu" else (torch.float16, *_CPU_DTYPES)
        if self.dtype not in supported:
            names = " or ".join(str(d) for d in supported)
            raise ValueError(
                f"freeze: dtype: expected {names} on {self.device.type}, got {self.dtype}"
            )
        dtypes = (self.dtype, weight.dtype)
        with torch.no_grad():
            self._stem, self._body = (
                [
                    _step(getattr(self.model, name), dtypes)
                    for name in names
                    if hasattr(self.model, name)
                ]
                for names in (_STEM, _BODY)
            )
            self._head = _head(self.model, dtypes)
        self._watch = watch

    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of ``images``.

        Args:
            images: ``[N, 3, H, W]`` in any memory format, or ``[N, H, W, 3]``; uint8 in 0..255, or
                floating, normalised as the model expects it. H and W as the model takes them.

        Raises:
            ValueError: images of another shape. TypeError: of another dtype. RuntimeError: on
                another device than the model's.
        """
        assert self._watch is not None
        if self._watch.changed():
            self.refresh()
        # Autocast is for models that leave their dtypes open.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x = self._load(images)
            # One channel of an image. The stem's largest activation has 64 channels of a quarter
            # of its pixels, the body's 480 of a 64th.
            plane = x.element_size() * x.shape[2] * x.shape[3]
            x = _in_slices(self._stem, x, _STEM_BYTES // max(1, 16 * plane))
            x = _in_slices(self._body, x, _BODY_BYTES // max(1, 8 * plane))
            return _run(self._head, x)

    def _load(self, images: Tensor) -> Tensor:
        """Images of any accepted kind to ``[N, 3, H, W]``, channels_last, normalised."""
        if not isinstance(images, Tensor) or images.layout != torch.strided:
            what = images.layout if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"engine: images: expected a dense Tensor, got {what}")
        if type(images) is not Tensor:
            images = images.as_subclass(Tensor)  # such as torchvision's tv_tensors.Image
        if images.dim() != 4:
            raise ValueError(
                f"engine: images: expected 4D input (got {images.dim()}D input) of shape "
                "[N, 3, H, W] or [N, H, W, 3]"
            )
        if images.shape[1] != 3 and images.shape[3] == 3:
            images = images.permute(0, 3, 1, 2)
        if images.shape[1] != 3:
            raise ValueError(
                "engine: images: expected shape [N, 3, H, W] or [N, H, W, 3], "
                f"got {list(images.shape)}"
            )
        if images.device != self.device:
            raise RuntimeError(
                f"engine: images: expected device {self.device}, got {images.device}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"engine: images: expected uint8 or floating, got {images.dtype}")
        scale, shift = self._affine(images.dtype == torch.uint8)
        kernel_takes = images.dtype in (torch.uint8, *_CPU_DTYPES) and self.dtype in _CPU_DTYPES
        if functional.why_unavailable() is None and images.device.type == "cpu" and kernel_takes:
            return torch.ops.inception_ext.image_to_nhwc(images, scale, shift, self.dtype)
        x = images.float()
        if (scale, shift) != _IDENTITY:
            vectors = [torch.tensor(v, device=x.device).view(3, 1, 1) for v in (scale, shift)]
            x = x * vectors[0] + vectors[1]
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _affine(self, is_uint8: bool) -> tuple[list[float], list[float]]:
        """Scale and shift per channel that bring an image to what the first convolution reads.

        ``transform_input`` belongs here, before the convolution pads with zeros, and not in its
        weights: folded into them it would be wrong at the borders.
        """
        scale, shift = [1.0] * 3, [0.0] * 3
        if is_uint8:
            scale = [1.0 / (255.0 * s) for s in self._std]
            shift = [-m / s for m, s in zip(self._mean, self._std, strict=True)]
        if getattr(self.model, "transform_input", False):
            for c in range(3):
                ratio = IMAGENET_STD[c] / 0.5
                scale[c] *= ratio
                shift[c] = shift[c] * ratio + (IMAGENET_MEAN[c] - 0.5) / 0.5
        return scale, shift

    def __repr__(self) -> str:
        steps = (*self._stem, *self._body)
        fused = sum(not isinstance(step, _ModuleCall) for step in steps)
        return (
            f"Engine({type(self.model).__name__}, {self.dtype}, {self.device}, "
            f"{fused} of {len(steps)} steps fused)"
        )


_IDENTITY = ([1.0] * 3, [0.0] * 3)

Step = Callable[[Tensor], Tensor]

# Large batches run in slices, whose largest activation has at most this many bytes. malloc asks the
# system for every block beyond 32 MiB anew, and each of its pages faults: a third of the time of a
# batch of 32. The stem's slices stay within a shared cache besides.
_STEM_BYTES = 8 << 20
_BODY_BYTES = 32 << 20


def _run(steps: Sequence[Step], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _in_slices(steps: Sequence[Step], x: Tensor, images: int) -> Tensor:
    """Runs steps on slices of at most ``images`` images, where all are ours and on the CPU."""
    n = x.shape[0]
    slices = -(-n // max(1, images))
    if slices <= 1 or x.device.type != "cpu" or any(isinstance(s, _ModuleCall) for s in steps):
        return _run(steps, x)
    return torch.cat([_run(steps, part) for part in x.split(-(-n // slices))])


# Attributes of layers that the fused steps read.
_SETTINGS = ("eps", "stride", "padding", "dilation", "groups", "padding_mode")


class _Watch:
    """Notices when anything that the weights were read from changes."""

    def __init__(self, model: nn.Module) -> None:
        entries: list[tuple[dict[Any, Any], str, Any]] = []
        self._sized: list[dict[Any, Any]] = []
        for module in model.modules():
            tables: list[dict[Any, Any]] = [module._parameters, module._buffers, module._modules]
            for table in tables:
                entries.extend((table, name, value) for name, value in table.items())
            attributes = module.__dict__
            entries.extend((attributes, k, attributes[k]) for k in _SETTINGS if k in attributes)
            # By their number: new children, hooks, and a forward() patched onto the object.
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            self._sized.extend((*tables, *hooks, attributes))
        self._tables, self._names, self._values = zip(*entries, strict=True)
        # The counts of batches too: torch does not count what training does to running statistics.
        self._tensors = [*model.parameters(), *model.buffers()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        # Kept, so that no new tensor gets the address of an old one.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        return (
            [tensor._version for tensor in self._counted],
            [tensor.data_ptr() for tensor in self._tensors],
            [len(table) for table in self._sized],
            bool(_has_any_global_hook()),
        )

    def changed(self) -> bool:
        values = map(dict.get, self._tables, self._names)
        return self._read() != self._state or not all(map(operator.is_, values, self._values))


_Dtypes = tuple[torch.dtype, torch.dtype]


class _ModuleCall:
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


class _Convolution:
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
        if x.numel() == 0 or not _has_fused_convolution(x):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, [1, 1], 1, list(x.shape)
            )
        leaky = ("leaky_relu", [_SLOPE], None)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self.bias, self.padding, self.stride, [1, 1], 1, *leaky
        )


def _has_fused_convolution(x: Tensor) -> bool:
    """oneDNN's fused convolution is a private operator of torch, and may be missing."""
    return bool(
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class _Inception:
    """An Inception module: merged 1x1, two convolutions, pool and projection, into one output."""

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        b1, b2, b3, b4 = block.branch1, block.branch2, block.branch3, block.branch4
        folded = [_fold(conv) for conv in (b1, b2[0], b3[0])]
        self.split = [weight.shape[0] for weight, _ in folded]
        self.merged = _Convolution(
            torch.cat([weight for weight, _ in folded]),
            torch.cat([bias for _, bias in folded]),
            (1, 1),
            (0, 0),
            dtype,
        )
        self.conv_3x3 = _fused_convolution(b2[1], dtype)
        self.conv_5x5 = _fused_convolution(b3[1], dtype)
        self.pool: nn.Module = b4[0]
        self.projection = _fused_convolution(b4[1], dtype)

    def __call__(self, x: Tensor) -> Tensor:
        # [N, K1 + K3red + K5red, H, W]: all that reads x
        y1, y3, y5 = self.merged(x).split(self.split, 1)
        pooled = max_pool(self.pool, x)
        return torch.cat([y1, self.conv_3x3(y3), self.conv_5x5(y5), self.projection(pooled)], 1)


def _step(module: nn.Module, dtypes: _Dtypes) -> Step:
    """The fused step that stands for a module, or a call of the module."""
    if _is_foldable(module):
        return _fused_convolution(module, dtypes[0])
    if _is_inception(module):
        return _Inception(module, dtypes[0])
    if _is_plain(module, nn.MaxPool2d):
        return lambda x: max_pool(module, x)
    return _ModuleCall(module, dtypes)


def _head(model: Any, dtypes: _Dtypes) -> list[Step]:
    """Pool, dropout, classifier: ``[N, 1024, H, W]`` -> ``[N, num_classes]``."""
    pool = model.avgpool
    steps = [pool if _is_plain(pool, nn.AdaptiveAvgPool2d) else _ModuleCall(pool, dtypes)]
    steps.append(lambda x: torch.flatten(x, 1))
    dropout = getattr(model, "dropout", None)
    if isinstance(dropout, nn.Module) and not _is_plain(dropout, nn.Dropout):
        steps.append(_ModuleCall(dropout, dtypes))
    return [*steps, _classifier(model.fc, dtypes)]


def _classifier(module: Any, dtypes: _Dtypes) -> Step:
    if not _is_plain(module, nn.Linear):
        return _ModuleCall(module, dtypes)
    weight = module.weight.to(dtypes[0])
    bias = None if module.bias is None else module.bias.to(dtypes[0])
    return lambda x: F.linear(x, weight, bias)


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    return (
        isinstance(module, nn.Module)
        and functional.why_module_reference(module, kind) is None
        and not _has_any_global_hook()
    )


# The blocks by where they are defined; torchvision need not be there.
_CONVOLUTIONS = {
    ("inception_ext.modules", "BasicConv2d"),
    ("inception_ext.bvlc", "ConvReLU"),
    ("torchvision.models.googlenet", "BasicConv2d"),
}
_INCEPTIONS = {
    ("inception_ext.modules", "Inception"),
    ("torchvision.models.googlenet", "Inception"),
}


def _runs(module: Any, method: str, classes: set[tuple[str, str]]) -> bool:
    """Whether a module's method is that of one of the classes; a subclass may have its own."""
    function = getattr(type(module), method, None)
    owner = getattr(function, "__qualname__", "").removesuffix(f".{method}")
    return method not in module.__dict__ and (getattr(function, "__module__", ""), owner) in classes


def _is_foldable(module: Any) -> bool:
    """Whether a module computes relu(bn(conv(x))) or relu(conv(x)) and nothing else."""
    if not _runs(module, "forward", _CONVOLUTIONS) or not _has_no_hooks(module):
        return False
    children = list(module._modules)
    if not _is_plain(module.conv, nn.Conv2d) or children not in (["conv", "bn"], ["conv"]):
        return False
    conv = module.conv
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return False
    bn = module._modules.get("bn")
    return bn is None or (_is_plain(bn, nn.BatchNorm2d) and bn.running_mean is not None)


def _is_inception(module: Any) -> bool:
    if not all(_runs(module, method, _INCEPTIONS) for method in ("forward", "_forward")):
        return False
    if not _has_no_hooks(module) or list(module._modules) != [f"branch{i}" for i in (1, 2, 3, 4)]:
        return False
    branches = (module.branch2, module.branch3, module.branch4)
    if not all(_is_plain(branch, nn.Sequential) and len(branch) == 2 for branch in branches):
        return False
    reads_x = (module.branch1, module.branch2[0], module.branch3[0])
    return (
        all(_is_foldable(conv) for conv in (*reads_x, *(branch[1] for branch in branches)))
        and all(
            conv.conv.kernel_size == (1, 1)
            and conv.conv.stride == (1, 1)
            and conv.conv.padding == (0, 0)
            for conv in reads_x
        )
        and _is_plain(module.branch4[0], nn.MaxPool2d)
    )


def _has_no_hooks(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _fold(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight ``[K, C, R, S]`` and bias ``[K]`` of a block's convolution with its batch norm in it.

    ``bn(conv(x)) = (w * s) x + (b + (bias - mean) * s)`` with ``s = gamma / sqrt(var + eps)``, in
    float32 whatever the dtype of the block.
    """
    conv: Any = block.conv
    weight = conv.weight.detach().float()
    bias = weight.new_zeros(weight.shape[0]) if conv.bias is None else conv.bias.detach().float()
    bn: Any = block._modules.get("bn")
    if bn is not None:
        scale = torch.rsqrt(bn.running_var.float() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.detach().float()
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - bn.running_mean.float()) * scale
        if bn.bias is not None:
            bias = bias + bn.bias.detach().float()
    return weight, bias


def _fused_convolution(block: Any, dtype: torch.dtype) -> _Convolution:
    weight, bias = _fold(block)
    return _Convolution(weight, bias, block.conv.stride, block.conv.padding, dtype)
