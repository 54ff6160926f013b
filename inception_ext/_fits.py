"""Whether what an op takes beside x goes with it; if not, the reference has the error."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inception_ext._autocast import casts_in_op
from inception_ext._gate import PLAIN_TYPES, runs_on_cpu
from inception_ext._process_group import Group
from inception_ext._steps import FoldedInception

__all__ = ["chain_fits", "folded_inception_fits", "has_batch", "inception_fits", "vectors_fit"]


def has_batch(x: Tensor, training: bool, group: Group) -> bool:
    """Whether there are kernels for the group, and a variance to compute where one is needed."""
    if group.size > 1:
        return not runs_on_cpu(x)
    n, _, h, w = x.shape
    return not training or n * h * w > 1


def vectors_fit(
    x: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    channels: Sequence[int],
    training: bool,
) -> bool:
    """Whether batch norms' vectors go with x.

    Args:
        lists: weights, biases, running means and variances; the last two may be None in training.
        channels: of each batch norm.
    """
    if training and all(v is None for vectors in lists[2:] for v in vectors):
        lists = lists[:2]
    vectors = [v for vectors in lists for v in vectors]
    dtype = None if vectors[0] is None else vectors[0].dtype
    return dtype in (x.dtype, torch.float32) and all(
        v is not None
        and type(v) in PLAIN_TYPES
        and v.dtype == dtype
        and v.device == x.device
        and v.shape == (channels[i % len(channels)],)
        for i, v in enumerate(vectors)
    )


def _weights_fit(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether convolutions' weights are plain, where x is, and of the dtype that goes with it."""
    dtype = weights[0].dtype
    if dtype != x.dtype and not (dtype == torch.float32 and casts_in_op(x)):
        return False
    return all(
        type(weight) in PLAIN_TYPES and weight.dtype == dtype and weight.device == x.device
        for weight in weights
    )


def inception_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the six convolutions' weights go with x and with one another."""
    if any(weight.dim() != 4 or weight.shape[0] == 0 for weight in weights):
        return False
    if 0 in x.shape[1:] or not _weights_fit(x, weights):
        return False
    sizes = [weight.shape for weight in weights]
    inputs = (x.shape[1], x.shape[1], sizes[1][0], x.shape[1], sizes[3][0], x.shape[1])
    kernels = (1, 1, 3, 1, 5 if sizes[4][-1] == 5 else 3, 1)
    return all(size[1:] == (c, r, r) for size, c, r in zip(sizes, inputs, kernels, strict=True))


def chain_fits(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether the weights of convolutions in turn go with x and with one another."""
    inputs = [x.shape[1], *(weight.shape[0] for weight in weights)]
    return _weights_fit(x, weights) and all(
        weight.shape[1] == channels for weight, channels in zip(weights, inputs, strict=False)
    )


def folded_inception_fits(x: Tensor, folded: FoldedInception) -> bool:
    """Whether the parameters of a folded module go with x and with one another."""
    widths, r = list(folded.widths), folded.branch3_kernel_size
    if x.dim() != 4 or len(widths) != 3 or len(folded.weights) != 4 or len(folded.biases) != 4:
        return False
    if min(widths) < 1 or 0 in x.shape[1:] or r not in (1, 3, 5, 7):
        return False
    rows = (x.shape[1], 9 * widths[1], r * r * widths[2], x.shape[1])
    return folded.weights[0].shape[:1] == (sum(widths),) and all(
        weight.dim() == 2
        and (weight.dtype, weight.device) == (x.dtype, x.device)
        and weight.shape[1] == -(-row // 8) * 8
        and (bias.dtype, bias.device) == (torch.float32, x.device)
        and bias.shape == weight.shape[:1]
        for weight, bias, row in zip(folded.weights, folded.biases, rows, strict=True)
    )
