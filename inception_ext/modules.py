"""The building blocks of GoogLeNet, with torchvision's constructors, names and state_dict keys."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import functional
from inception_ext._batch_norms import (
    batch_norm_kind,
    batch_norm_relu,
    start_batch,
    takes_batch,
    why_batch_norm_reference,
)
from inception_ext._conv_relu import conv_relu_inception, fuses_on_cuda
from inception_ext._gate import (
    runs_on_cpu,
    why_conv3x3_reference,
    why_hooked,
    why_module_reference,
    why_no_chain_kernel,
    why_no_kernel,
    why_reference,
    why_unavailable,
)
from inception_ext._layers import aux_pool, has_square_window, keeps_size, max_pool, pool_window
from inception_ext._process_group import group_of

__all__ = ["BasicConv2d", "Inception", "InceptionAux"]


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        **kwargs: passed on to ``nn.Conv2d`` (``kernel_size`` is required).

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, out_channels, P, Q]``, any floating dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.relu(self.bn(self.conv(x)))
        else:  # the compiler of TorchScript leaves this branch alone
            return _basic_conv2d(self, x)


def _basic_conv2d(block: BasicConv2d, x: Tensor) -> Tensor:
    conv: Any = block.conv
    bn = block.bn
    if why_reference(x) is not None:  # not for the CPU's kernels
        settings = _chain_settings([block], None, x)
        if settings is not None:
            return functional.conv_chain(x, *settings)
        return batch_norm_relu(bn, conv(x))
    if (
        why_module_reference(conv, nn.Conv2d) is None
        and conv.kernel_size == (3, 3)
        and _is_plain(conv)
        and why_conv3x3_reference(x, conv._parameters["weight"]) is None
    ):
        return batch_norm_relu(bn, functional.conv3x3(x, conv._parameters["weight"]))
    return batch_norm_relu(bn, conv(x))


def conv_chain(blocks: list[Any], pool: Any, x: Tensor) -> Tensor:
    """Calls one or two convolution blocks and then a pool, as one op where it can stand in."""
    if all(_why_conv_block_reference(block) is None for block in blocks):
        settings = _chain_settings(blocks, pool, x)
        if settings is not None:
            return functional.conv_chain(x, *settings)
    for block in blocks:
        x = block(x)
    return max_pool(pool, x)


def _chain_settings(blocks: list[Any], pool: Any, x: Tensor) -> tuple[Any, ...] | None:
    """What :func:`inception_ext.functional.conv_chain` takes behind x, or None where it cannot run.

    Counts the batch where it can.
    """
    if why_no_kernel(x) is not None or runs_on_cpu(x):
        return None
    window: tuple[list[int], list[int], list[int]] = ([], [], [])
    for block in blocks:
        conv, bn = block.conv, block.bn
        if (
            why_module_reference(conv, nn.Conv2d) is not None
            or conv.bias is not None
            or not has_square_window(conv)
            or why_batch_norm_reference(bn) is not None
            or batch_norm_kind(bn) != batch_norm_kind(blocks[0].bn)
        ):
            return None
        window[0].append(conv.stride[0])
        window[1].append(conv.padding[0])
    if pool is not None:
        sizes = pool_window(pool)
        if sizes is None:
            return None
        window[2].extend(sizes)
    bns = [block.bn for block in blocks]
    conv_weights = [block.conv.weight for block in blocks]
    settings = (takes_batch(bns[0]), group_of(bns[0]))
    if why_no_chain_kernel(x, conv_weights, *window, *settings) is not None:
        return None
    batch = start_batch(bns)
    return None if batch is None else (conv_weights, *batch.vectors, *window, *batch.settings)


def _why_conv_block_reference(block: Any) -> str | None:
    """Why calling a convolution block does more than its class's ``forward``, or None."""
    # Subclasses that keep forward(), such as those of accelerate(), are the same.
    if getattr(type(block), "forward", None) is not BasicConv2d.forward:
        return f"{type(block).__name__} in place of BasicConv2d"
    return why_hooked(block)


class Inception(nn.Module):
    """Four parallel branches over one input, concatenated along the channels.

    ============  ===========================================
    ``branch1``   1x1 to ``ch1x1``
    ``branch2``   1x1 to ``ch3x3red``, then 3x3 to ``ch3x3``
    ``branch3``   1x1 to ``ch5x5red``, then 3x3 to ``ch5x5``
    ``branch4``   3x3 max pool, then 1x1 to ``pool_proj``
    ============  ===========================================

    torchvision, and the weights that it publishes, have a 3x3 convolution in the "5x5" branch.
    That is the default here too; ``branch3_kernel_size=5`` is the module of the 2014 paper.

    Args:
        in_channels: channels of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: widths, see the table.
        conv_block: called as ``conv_block(in_channels, out_channels, **conv_kwargs)`` for each
            convolution; default :class:`BasicConv2d`.
        branch3_kernel_size: 3 or 5; the padding follows.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]``.

    Raises:
        ValueError: ``branch3_kernel_size`` is neither 3 nor 5.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., nn.Module] | None = None,
        *,
        branch3_kernel_size: int = 3,
    ) -> None:
        super().__init__()
        if branch3_kernel_size not in (3, 5):
            raise ValueError(
                f"branch3_kernel_size should be 3 or 5 instead of {branch3_kernel_size}"
            )
        conv = BasicConv2d if conv_block is None else conv_block

        self.branch1 = conv(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv(in_channels, ch3x3red, kernel_size=1),
            conv(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, kernel_size=1),
            conv(
                ch5x5red,
                ch5x5,
                kernel_size=branch3_kernel_size,
                padding=branch3_kernel_size // 2,
            ),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        """The four branch outputs, before the concatenation."""
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return torch.cat(self._forward(x), 1)
        else:
            return _inception(self, x)

    def extra_repr(self) -> str:
        reason = why_unavailable() or why_branches_reference(self)
        if reason is None and fuses_on_cuda(_conv_blocks(self)):
            return "fused on CUDA"
        reason = reason or why_block_reference(self)
        return "fused" if reason is None else f"not fused: {reason}"


def _inception(block: Inception, x: Tensor) -> Tensor:
    if why_no_kernel(x) is not None or why_block_reference(block) is not None:
        return _other_inception(block, x)
    convs, bns = _convs_and_bns(block)
    batch = start_batch(bns)
    if batch is None:
        return torch.cat(block._forward(x), 1)
    conv_weights = [conv._parameters["weight"] for conv in convs]
    return functional.inception(x, conv_weights, *batch.vectors, *batch.settings)


def _other_inception(block: Inception, x: Tensor) -> Tensor:
    """With other convolution blocks than :class:`BasicConv2d`, or without kernels."""
    y = None
    if why_branches_reference(block) is None:
        y = conv_relu_inception(_conv_blocks(block), x)
    return torch.cat(block._forward(x), 1) if y is None else y


# Below, children and parameters are read from the tables of their modules: an attribute that
# nn.Module has to look up there costs ten times as much, and there are 70 of them a call. A child
# that is no module is not in the table, and the reason against the kernels is that it is None.


def _conv_blocks(block: Inception) -> list[Any]:
    """The six convolution blocks, in the order of :func:`inception_ext.functional.inception`."""
    children = block._modules
    branch2, branch3, branch4 = (
        children[name]._modules.values()  # type: ignore[union-attr]
        for name in ("branch2", "branch3", "branch4")
    )
    return [children.get("branch1"), *branch2, *branch3, *list(branch4)[1:]]


def _convs_and_bns(block: Inception) -> tuple[list[Any], list[Any]]:
    """Of blocks that are :class:`BasicConv2d`."""
    tables = [conv_block._modules for conv_block in _conv_blocks(block)]
    return [table.get("conv") for table in tables], [table.get("bn") for table in tables]


def why_branches_reference(block: Inception) -> str | None:
    """Why an Inception module is not four branches with a pool and six convolution blocks."""
    if type(block)._forward is not Inception._forward or "_forward" in block.__dict__:
        return f"{type(block).__name__} has its own _forward"
    children = block._modules
    for name in ("branch2", "branch3", "branch4"):
        sequence: Any = children.get(name)
        if (reason := why_module_reference(sequence, nn.Sequential)) is not None:
            return reason
        if len(sequence._modules) != 2:
            return f"a branch of {len(sequence._modules)} modules, not 2"
    pool = next(iter(sequence._modules.values()))
    if (reason := why_module_reference(pool, nn.MaxPool2d)) is not None:
        return reason
    if (pool.kernel_size, pool.stride, pool.padding, pool.dilation) != (3, 1, 1, 1):
        return "a pool other than 3x3, stride 1, padding 1"
    if pool.return_indices:
        return "a pool that returns indices"
    return None


def why_block_reference(block: Inception) -> str | None:
    """Why an Inception module does not run as one op, or None."""
    if (reason := why_branches_reference(block)) is not None:
        return reason
    for conv_block in _conv_blocks(block):
        if (reason := _why_conv_block_reference(conv_block)) is not None:
            return reason
    convs, bns = _convs_and_bns(block)
    for conv in convs:
        if (reason := why_module_reference(conv, nn.Conv2d)) is not None:
            return reason
        if not _is_plain(conv):
            return (
                "a convolution with bias, stride, dilation, groups or unusual padding, or whose "
                "weight is no parameter"
            )
    for bn in bns:
        if (reason := why_batch_norm_reference(bn)) is not None:
            return reason
    kinds = [batch_norm_kind(bn) for bn in bns]
    if any(kind != kinds[0] for kind in kinds):
        return "batch norms that differ in training, momentum, eps, statistics or group"
    if len(set(bns)) != 6:
        return "a batch norm that is part of two branches"
    return None


def _is_plain(conv: Any) -> bool:
    """Whether all that matters of a convolution is its weight, and that is a parameter."""
    parameters = conv._parameters
    return (
        parameters.get("weight") is not None
        and "bias" in parameters  # or it is something else, such as a plain tensor
        and parameters["bias"] is None
        and has_square_window(conv)
        and keeps_size(conv)
    )


class InceptionAux(nn.Module):
    """Auxiliary classifier: average pool to 4x4, 1x1 convolution, two linear layers.

    Args:
        in_channels: channels of the input.
        num_classes: width of the output.
        conv_block: as in :class:`Inception`.
        dropout: probability of zeroing a unit between the two linear layers.

    Shape:
        ``[N, in_channels, H, W]`` -> ``[N, num_classes]``, any H and W.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        conv_block: Callable[..., nn.Module] | None = None,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        conv = BasicConv2d if conv_block is None else conv_block
        self.conv = conv(in_channels, 128, kernel_size=1)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.dropout = nn.Dropout(p=dropout)

    def _pool(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.adaptive_avg_pool2d(x, (4, 4))
        else:  # the compiler of TorchScript leaves this branch alone
            return aux_pool(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self._pool(x)  # [N, in_channels, 4, 4]
        x = self.conv(x)  # [N, 128, 4, 4]
        x = torch.flatten(x, 1)  # [N, 2048]
        x = F.relu(self.fc1(x))  # [N, 1024]
        x = self.dropout(x)
        return self.fc2(x)
