"""``autograd.Function``s around the compiled ops.

Each saves by name what its backward reads. Asked for a differentiable backward
(``create_graph=True``) or for several at once (``is_grads_batched=True``, or ``vmap`` around it),
each recomputes through :mod:`inception_ext.reference` instead of its op, which has neither a
derivative nor a batching rule of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inception_ext import _library, reference
from inception_ext._backward import flat, needs_reference, reference_gradients, wanted
from inception_ext._process_group import ALONE, Group

__all__ = ["BatchNormRelu", "Conv3x3", "ConvChain", "Inception", "MaxPool"]


class MaxPool(torch.autograd.Function):
    """:func:`inception_ext.reference.max_pool` with a uint8 window index saved for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel_size: list[int],
        stride: list[int],
        padding: list[int],
        ceil_mode: bool,
    ) -> Tensor:
        y, argmax = _library.ops(x).max_pool_forward(
            x, kernel_size, stride, padding, ceil_mode, True
        )
        ctx.save_for_backward(argmax)
        ctx.input_size = list(x.shape[2:])
        ctx.window = (kernel_size, stride, padding)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (argmax,) = ctx.saved_tensors
        if needs_reference(grad):
            dx = _scatter_to_windows(grad, argmax, ctx.input_size, *ctx.window)
        else:
            dx = _library.ops(grad).max_pool_backward(grad, argmax, ctx.input_size, *ctx.window)
        return dx, None, None, None, None


def _scatter_to_windows(
    grad: Tensor,
    argmax: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """The max pool's backward in differentiable ops: linear in ``grad`` ``[N, C, P, Q]``."""
    n, c, p, q = grad.shape
    h, w = input_size
    index = argmax.to(torch.int64)
    rows = torch.arange(p, device=grad.device).view(p, 1) * stride[0] - padding[0]
    columns = torch.arange(q, device=grad.device) * stride[1] - padding[1]
    flat = (rows + index // kernel_size[1]) * w + columns + index % kernel_size[1]
    zeros = grad.new_zeros(n, c, h * w)
    windows = (n, c, p * q)
    dx = zeros.scatter_add(2, flat.reshape(windows), grad.reshape(windows))
    return dx.reshape(n, c, h, w)


class Conv3x3(torch.autograd.Function):
    """:func:`inception_ext.reference.conv3x3` in float32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _library.ops(x).conv3x3_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if needs_reference(grad):
            return tuple(reference_gradients(reference.conv3x3, grad, [x, weight]))
        needs = list(ctx.needs_input_grad)
        gradients = _library.ops(grad).conv3x3_backward(grad, x, weight, needs)
        return tuple(g if need else None for g, need in zip(gradients, needs, strict=True))


class BatchNormRelu(torch.autograd.Function):
    """:func:`inception_ext.reference.batch_norm_relu`; the ReLU's mask is recomputed from x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        group: Group = ALONE,
    ) -> Tensor:
        y, mean, rstd = _library.ops(x).batch_norm_relu_forward(
            x, weight, bias, running_mean, running_var, training, momentum, eps, *group
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.training = training
        ctx.eps = eps
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients: list[Tensor | None]
        if needs_reference(grad):

            def again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                if ctx.training:  # by the statistics of the batch anew
                    settings = (None, None, True, 0.0, ctx.eps, ctx.group)
                    return reference.batch_norm_relu(x, weight, bias, *settings)
                statistics = _running(mean, rstd, weight.dtype)
                return reference.batch_norm_relu(x, weight, bias, *statistics, False, 0.0, 0.0)

            gradients = reference_gradients(again, grad, [x, weight, bias])
        else:
            gradients = list(
                _library.ops(grad).batch_norm_relu_backward(
                    grad, x, weight, bias, mean, rstd, ctx.training, any(needs[1:]), *ctx.group
                )
            )
        return (
            *(g if need else None for g, need in zip(gradients, needs, strict=True)),
            *(None,) * 6,
        )


def _running(mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The running statistics that give, with eps 0, the mean and rstd that were used."""
    return mean.to(dtype), (rstd**-2).to(dtype)


class Inception(torch.autograd.Function):
    """:func:`inception_ext.reference.inception`, one op forward and one backward.

    The six convolution weights, batch norm weights and batch norm biases come flat, in the order
    of the reference, because autograd looks for tensors among the arguments only. On CUDA the
    convolution weights may be float32 where x has 16 bits: the op casts and packs them at once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        training: bool,
        momentum: float,
        eps: float,
        exact: bool,
        group: Group,
        running_means: list[Tensor],
        running_vars: list[Tensor],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        op = _library.ops(x).inception_forward
        statistics = (running_means, running_vars)
        settings = (training, momentum, eps, exact, group)
        return _with_batch_norms(ctx, op, (), settings, statistics, x, parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op = _library.ops(grad).inception_backward
        # The op's statistics lie in one vector: the merged 1x1 convolutions first.
        return _with_batch_norms_backward(ctx, grad, op, reference.inception, (0, 1, 3, 2, 4, 5))


class ConvChain(torch.autograd.Function):
    """:func:`inception_ext.reference.conv_chain`, one op forward and one backward (CUDA).

    Of one or two convolutions the weights, batch norm weights and batch norm biases, flat.
    """

    @staticmethod
    def forward(
        ctx: Any,
        strides: list[int],
        paddings: list[int],
        pool: list[int],
        training: bool,
        momentum: float,
        eps: float,
        exact: bool,
        group: Group,
        running_means: list[Tensor],
        running_vars: list[Tensor],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        op = _library.ops(x).conv_chain_forward
        window = (strides, paddings, pool)
        statistics = (running_means, running_vars)
        settings = (training, momentum, eps, exact, group)
        return _with_batch_norms(ctx, op, window, settings, statistics, x, parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op = _library.ops(grad).conv_chain_backward
        order = range(ctx.length)
        return _with_batch_norms_backward(ctx, grad, op, reference.conv_chain, order)


def _with_batch_norms(
    ctx: Any,
    op: Callable[..., Sequence[Tensor]],
    window: tuple[list[int], ...],
    settings: tuple[bool, float, float, bool, Group],
    statistics: tuple[list[Tensor], list[Tensor]],
    x: Tensor,
    parameters: Sequence[Tensor],
) -> Tensor:
    """Runs the op of convolutions with batch norms, and saves what its backward reads."""
    training, momentum, eps, exact, group = settings
    lists = (*_thirds(parameters), *statistics)
    y, *saved = op(x, *lists, *window, training, momentum, eps, True, exact, *group)
    ctx.save_for_backward(x, *parameters, *saved)
    ctx.length = len(parameters) // 3
    ctx.window = window
    ctx.settings = (training, eps, exact, group)
    return y


def _with_batch_norms_backward(
    ctx: Any,
    grad: Tensor,
    op: Callable[..., Sequence[Any]],
    function: Callable[..., Tensor],
    order: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """Of all arguments. ``function``: the reference; order: of its convolutions in the op's mean
    and rstd."""
    x, *tensors = ctx.saved_tensors
    training, eps, exact, group = ctx.settings
    length, window = ctx.length, ctx.window
    parameters, saved = tensors[: 3 * length], tensors[3 * length :]
    first = len(window) + 7  # x, among the arguments
    gradients: list[Tensor | None]
    if needs_reference(grad):
        sizes = [parameters[i].shape[0] for i in order]
        mean, rstd = (dict(zip(order, vector.split(sizes), strict=True)) for vector in saved[-2:])

        def again(x: Tensor, *p: Tensor) -> Tensor:
            conv_weights, weights, biases = _thirds(p)
            lists = ([weight.to(x.dtype) for weight in conv_weights], weights, biases)
            if training:  # by the statistics of the batch anew
                nothing = [None] * length
                return function(x, *lists, nothing, nothing, *window, True, 0.0, eps, group)
            statistics = [_running(mean[i], rstd[i], weights[i].dtype) for i in range(length)]
            return function(x, *lists, *zip(*statistics, strict=True), *window, False, 0.0, 0.0)

        gradients = reference_gradients(again, grad, [x, *parameters])
    else:
        needs = wanted(ctx, first, 1 + length)  # x, then the convolutions' weights
        affine = ctx.needs_input_grad[first + 1 + length :]
        lists = _thirds(parameters)
        arguments = (*saved, *window, training, needs, exact, any(affine), *group)
        dx, *parts = op(grad, x, *lists, *arguments)
        gradients = flat(dx, parts, [*needs, *affine])
    return *(None,) * first, *gradients


def _thirds(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Convolution weights, batch norm weights, batch norm biases."""
    n = len(parameters) // 3
    return list(parameters[:n]), list(parameters[n : 2 * n]), list(parameters[2 * n :])
