"""Which modules can be folded into fused steps, and the folding of batch norms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from inception_ext._gate import why_module_reference

__all__ = ["fold", "is_foldable", "is_inception", "is_plain"]


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    return (
        isinstance(module, nn.Module)
        and why_module_reference(module, kind) is None
        and not _has_any_global_hook()
    )


# The blocks by where they are defined; torchvision need not be there.
_CONVOLUTIONS = {
    ("inception_ext.modules", "BasicConv2d"),
    ("inception_ext._conv_relu", "ConvReLU"),
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


def is_foldable(module: Any) -> bool:
    """Whether a module computes relu(bn(conv(x))) or relu(conv(x)) and nothing else."""
    if not _runs(module, "forward", _CONVOLUTIONS) or not _has_no_hooks(module):
        return False
    children = list(module._modules)
    if not is_plain(module.conv, nn.Conv2d) or children not in (["conv", "bn"], ["conv"]):
        return False
    conv = module.conv
    if conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return False
    bn = module._modules.get("bn")
    return bn is None or (is_plain(bn, nn.BatchNorm2d) and bn.running_mean is not None)


def is_inception(module: Any) -> bool:
    if not all(_runs(module, method, _INCEPTIONS) for method in ("forward", "_forward")):
        return False
    if not _has_no_hooks(module) or list(module._modules) != [f"branch{i}" for i in (1, 2, 3, 4)]:
        return False
    branches = (module.branch2, module.branch3, module.branch4)
    if not all(is_plain(branch, nn.Sequential) and len(branch) == 2 for branch in branches):
        return False
    reads_x = (module.branch1, module.branch2[0], module.branch3[0])
    return (
        all(is_foldable(conv) for conv in (*reads_x, *(branch[1] for branch in branches)))
        and all(
            conv.conv.kernel_size == (1, 1)
            and conv.conv.stride == (1, 1)
            and conv.conv.padding == (0, 0)
            for conv in reads_x
        )
        and is_plain(module.branch4[0], nn.MaxPool2d)
    )


def _has_no_hooks(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def fold(block: nn.Module) -> tuple[Tensor, Tensor]:
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
