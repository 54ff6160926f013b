"""``autograd.Function``s of the layers without weights that only CUDA has kernels for.

See :mod:`inception_ext.autograd`, whose rules hold here too.
"""

from typing import Any

import torch
from torch import Tensor

from inception_ext import _library, reference
from inception_ext._backward import needs_reference, reference_gradients

__all__ = ["AuxPool", "Lrn", "lrn"]


class AuxPool(torch.autograd.Function):
    """:func:`inception_ext.reference.aux_pool`, which is linear: nothing is saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output_size: int, kernel_size: int, stride: int) -> Tensor:
        ctx.input_size = list(x.shape[2:])
        ctx.window = (output_size, kernel_size, stride)
        return _library.ops(x).aux_pool_forward(x, *ctx.window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx: Tensor | None
        if needs_reference(grad):
            shape = (*grad.shape[:2], *ctx.input_size)
            x = torch.zeros(shape, dtype=grad.dtype, device=grad.device, requires_grad=True)
            (dx,) = reference_gradients(lambda x: reference.aux_pool(x, *ctx.window), grad, [x])
        else:
            dx = _library.ops(grad).aux_pool_backward(grad, ctx.input_size, *ctx.window[1:])
        return dx, None, None, None


class Lrn(torch.autograd.Function):
    """:func:`inception_ext.reference.lrn`; all that is saved for backward is x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.window = (size, alpha, beta, k)
        return lrn(x, *ctx.window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dx: Tensor | None
        if needs_reference(grad):
            (dx,) = reference_gradients(lambda x: reference.lrn(x, *ctx.window), grad, [x])
        else:
            dx = _library.ops(grad).lrn_backward(grad, x, *ctx.window)
        return dx, None, None, None, None


def lrn(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """The op, into a new tensor."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    _library.ops(x).lrn(x, size, alpha, beta, k, y)
    return y
