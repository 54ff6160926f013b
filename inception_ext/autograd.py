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
from inception_ext._process_group import ALONE, Group

__all__ = ["BatchNormRelu", "Conv3x3", "ConvChain", "Inception", "MaxPool"]


def needs_reference(grad: Tensor) -> bool:
    """Whether the backward that runs now is to be differentiated or batched, as no op can be."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return (
        torch.is_grad_enabled()
        or functorch.peek_interpreter_stack() is not None
        or functorch.is_legacy_batchedtensor(grad)  # of is_grads_batched=True
    )


def _wanted(ctx: Any, first: int, count: int) -> list[bool]:
    """Of the tensors from argument ``first`` on: whether the backward that runs now is to give
    their gradients.

    Of those that need one, ``torch.autograd.grad`` and ``backward(inputs=...)`` may ask for a part.
    """
    needs = list(ctx.needs_input_grad[first : first + count])
    if torch.compiler.is_compiling():
        return needs
    nodes = [node for node, _ in ctx.next_functions[:count]]  # those of the tensors
    return [need and _is_to_run(node) for need, node in zip(needs, nodes, strict=True)]


def _is_to_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf of torch.autograd.grad
        return True


def _flat(
    dx: Tensor, lists: Sequence[Sequence[Tensor]], needs: Sequence[bool]
) -> list[Tensor | None]:
    """An op's gradients in the order of its tensors; None for those that nobody wants."""
    gradients = [dx, *(gradient for gradients in lists for gradient in gradients)]
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def reference_gradients(
    function: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of those inputs that need one, differentiable if asked for; None for the others."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of aliases: where one input was computed from another, that path is not this function's.
        aliases = [tensor.view_as(tensor) for tensor in inputs]
        output = function(*aliases)
    wanted = [alias for alias in aliases if alias.requires_grad]
    gradients = torch.autograd.grad(
        output, wanted, grad, create_graph=create_graph, allow_unused=True
    )
    found = iter(gradients)
    return [next(found) if alias.requires_grad else None for alias in aliases]


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

            def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                settings = (ctx.training, ctx.eps, ctx.group)
                return _batch_norm_relu(x, weight, bias, mean, rstd, *settings)

            gradients = reference_gradients(function, grad, [x, weight, bias])
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


def _batch_norm_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    group: Group,
) -> Tensor:
    """The reference with saved statistics: those of the batch anew, or constants."""
    if training:
        return reference.batch_norm_relu(x, weight, bias, None, None, True, 0.0, eps, group)
    # 1 / sqrt(var + 0) is the rstd that was used.
    return reference.batch_norm_relu(
        x, weight, bias, mean.to(weight.dtype), (rstd**-2).to(weight.dtype), False, 0.0, 0.0
    )


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
        conv_weights, weights, biases = parameters[:6], parameters[6:12], parameters[12:]
        out, *saved = _library.ops(x).inception_forward(
            x,
            conv_weights,
            weights,
            biases,
            running_means,
            running_vars,
            training,
            momentum,
            eps,
            True,
            exact,
            *group,
        )
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.exact = exact
        ctx.group = group
        ctx.training = training
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        parameters, saved = tensors[:18], tensors[18:]
        conv_weights, weights, biases = parameters[:6], parameters[6:12], parameters[12:]
        gradients: list[Tensor | None]
        if needs_reference(grad):
            mean, rstd = saved[-2:]

            def function(x: Tensor, *p: Tensor) -> Tensor:
                lists = ([weight.to(x.dtype) for weight in p[:6]], p[6:12], p[12:])
                return _inception(x, *lists, mean, rstd, ctx.training, ctx.eps, ctx.group)

            gradients = reference_gradients(function, grad, [x, *parameters])
        else:
            needs = _wanted(ctx, 7, 7)  # x, then the convolutions' weights
            affine = ctx.needs_input_grad[14:]
            dx, *lists = _library.ops(x).inception_backward(
                grad,
                x,
                conv_weights,
                weights,
                biases,
                *saved,
                ctx.training,
                needs,
                ctx.exact,
                any(affine),
                *ctx.group,
            )
            gradients = _flat(dx, lists, [*needs, *affine])
        return *(None,) * 7, *gradients


# The op's statistics lie in one vector: the merged 1x1 convolutions first.
_STATISTICS_ORDER = (0, 1, 3, 2, 4, 5)


def _inception(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    eps: float,
    group: Group,
) -> Tensor:
    """The reference with saved statistics, see :func:`_batch_norm_relu`."""
    if training:
        nothing = [None] * 6
        return reference.inception(
            x, conv_weights, weights, biases, nothing, nothing, True, 0.0, eps, group
        )
    sizes = [conv_weights[i].shape[0] for i in _STATISTICS_ORDER]
    means = dict(zip(_STATISTICS_ORDER, mean.split(sizes), strict=True))
    variances = dict(zip(_STATISTICS_ORDER, (rstd**-2).split(sizes), strict=True))
    dtype = weights[0].dtype
    return reference.inception(
        x,
        conv_weights,
        weights,
        biases,
        [means[i].to(dtype) for i in range(6)],
        [variances[i].to(dtype) for i in range(6)],
        False,
        0.0,
        0.0,
    )


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
        lists = _thirds(parameters)
        window = (strides, paddings, pool)
        statistics = (running_means, running_vars)
        settings = (training, momentum, eps, True, exact, *group)
        y, *saved = _library.ops(x).conv_chain_forward(x, *lists, *statistics, *window, *settings)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.window = window
        ctx.settings = (training, eps, exact, group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        parameters, saved = tensors[:-5], tensors[-5:]
        training, eps, exact, group = ctx.settings
        length = len(parameters) // 3
        gradients: list[Tensor | None]
        if needs_reference(grad):
            mean, rstd = saved[-2:]

            def function(x: Tensor, *p: Tensor) -> Tensor:
                window = ctx.window
                return _conv_chain(x, _thirds(p), (mean, rstd), window, training, eps, group)

            gradients = reference_gradients(function, grad, [x, *parameters])
        else:
            needs = _wanted(ctx, 10, 1 + length)  # x, then the convolutions' weights
            affine = ctx.needs_input_grad[11 + length :]
            dx, *lists = _library.ops(x).conv_chain_backward(
                grad,
                x,
                *_thirds(parameters),
                *saved,
                *ctx.window,
                training,
                needs,
                exact,
                any(affine),
                *group,
            )
            gradients = _flat(dx, lists, [*needs, *affine])
        return *(None,) * 10, *gradients


def _thirds(parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Convolution weights, batch norm weights, batch norm biases."""
    n = len(parameters) // 3
    return list(parameters[:n]), list(parameters[n : 2 * n]), list(parameters[2 * n :])


def _conv_chain(
    x: Tensor,
    parameters: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    statistics: tuple[Tensor, Tensor],
    window: tuple[Sequence[int], Sequence[int], Sequence[int]],
    training: bool,
    eps: float,
    group: Group,
) -> Tensor:
    """The reference with saved mean and rstd, see :func:`_batch_norm_relu`."""
    conv_weights, weights, biases = parameters
    filters = [weight.to(x.dtype) for weight in conv_weights]
    lists = (filters, weights, biases)
    if training:
        nothing = [None] * len(filters)
        return reference.conv_chain(x, *lists, nothing, nothing, *window, True, 0.0, eps, group)
    sizes, dtype = [weight.shape[0] for weight in filters], weights[0].dtype
    means = [part.to(dtype) for part in statistics[0].split(sizes)]
    variances = [part.to(dtype) for part in (statistics[1] ** -2).split(sizes)]
    return reference.conv_chain(x, *lists, means, variances, *window, False, 0.0, 0.0)
