"""What the backward of an ``autograd.Function`` around an op has to find out and to give."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["flat", "needs_reference", "reference_gradients", "wanted"]


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


def wanted(ctx: Any, first: int, count: int) -> list[bool]:
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


def flat(
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
