"""``autograd.Function``s of the layers without weights that only CUDA has kernels for.

See :mod:`inception_ext.autograd`, whose rules hold here too.
"""

from typing import Any

import torch
from torch import Tensor

from inception_ext import _library, reference
from inception_ext.autograd import needs_reference, reference_gradients

__all__ = ["Lrn", "lrn"]


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
