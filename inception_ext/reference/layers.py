"""Layers and modules: functions that autograd differentiates."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_ext import _process_group
from inception_ext._process_group import ALONE, Group

__all__ = [
    "aux_pool",
    "batch_norm_relu",
    "conv3x3",
    "conv_bn_relu",
    "conv_chain",
    "inception",
    "lrn",
    "max_pool",
]


def max_pool(
    x: Tensor,
    kernel_size: int,
    stride: int,
    padding: int = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """Largest value of each window: ``[N, C, H, W]`` -> ``[N, C, P, Q]``.

    ``P = (H + 2 * padding - kernel_size) / stride + 1``, rounded down or, with ``ceil_mode``, up
    (a last window that would start beyond the input and its left padding is dropped); Q likewise.
    NaN wins over every number; of equal values the first in row-major order gets the gradient.
    """
    return F.max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: Group = ALONE,
) -> Tensor:
    """``relu((x - mean) / sqrt(var + eps) * weight + bias)``, per channel.

    With ``training`` the mean and the biased variance are those of the batch, and the running
    statistics (where given) move in place: ``running += momentum * (batch - running)``, with the
    unbiased variance. Without, the running statistics are used as they are.

    Args:
        x: ``[N, C, H, W]``.
        weight, bias, running_mean, running_var: ``[C]`` or None.
        momentum: a number; a module's ``momentum=None`` (cumulative average) is resolved by the
            caller to ``1 / num_batches_tracked``.
        group: processes whose batches count as one in training, as with ``nn.SyncBatchNorm``;
            default: the calling process alone.

    Raises:
        ValueError: ``training`` and one value per channel, of which there is no variance.
    """
    vectors = (running_mean, running_var, weight, bias)
    if training and group.size > 1:
        y = _process_group.batch_norm(x, weight, bias, *vectors[:2], momentum, eps, group)
    elif training:
        y = F.batch_norm(x, *vectors, training, momentum, eps)
    else:  # F.batch_norm of torch 2.11 refuses eps 0, for variances that include it
        y = torch.batch_norm(
            x, weight, bias, *vectors[:2], False, momentum, eps, torch.backends.cudnn.enabled
        )
    return F.relu(y)


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of x ``[N, C, H, W]`` with ``weight`` ``[K, C, 3, 3]``, padding 1, no bias."""
    return F.conv2d(x, weight, padding=1)


def conv_bn_relu(
    x: Tensor,
    conv_weight: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    stride: int = 1,
    padding: int = 0,
    group: Group = ALONE,
) -> Tensor:
    """:func:`batch_norm_relu` of a convolution with ``conv_weight`` ``[K, C, R, S]``, no bias."""
    y = F.conv2d(x, conv_weight, None, stride, padding)
    return batch_norm_relu(
        y, weight, bias, running_mean, running_var, training, momentum, eps, group
    )


def conv_chain(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    strides: Sequence[int],
    paddings: Sequence[int],
    pool: Sequence[int],
    training: bool,
    momentum: float,
    eps: float,
    group: Group = ALONE,
) -> Tensor:
    """:func:`conv_bn_relu` once or more, then :func:`max_pool`.

    Args:
        x: ``[N, C, H, W]``.
        conv_weights: ``[K, C, R, R]`` of the first convolution, and so on.
        weights, biases, running_means, running_vars: of each batch norm, ``[K]``.
        strides, paddings: of each convolution.
        pool: kernel size, stride, padding, ceil mode (0 or 1); empty: none.
        training, momentum, eps, group: as in :func:`batch_norm_relu`.
    """
    settings = (training, momentum, eps)
    for i, conv_weight in enumerate(conv_weights):
        norm = (weights[i], biases[i], running_means[i], running_vars[i])
        x = conv_bn_relu(x, conv_weight, *norm, *settings, strides[i], paddings[i], group)
    if not pool:
        return x
    kernel_size, stride, padding, ceil_mode = pool
    return max_pool(x, kernel_size, stride, padding, bool(ceil_mode))


def inception(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    group: Group = ALONE,
) -> Tensor:
    """The Inception module: four branches of x, concatenated along the channels.

    Each list holds six entries, one a convolution, in this order::

        0  branch1     1x1 of x                   -> output
        1  branch2.0   1x1 of x                   -> 2
        2  branch2.1   3x3 of 1                   -> output
        3  branch3.0   1x1 of x                   -> 4
        4  branch3.1   3x3 or 5x5 of 3            -> output
        5  branch4.1   1x1 of max_pool(x, 3, 1)   -> output

    Args:
        x: ``[N, C, H, W]``.
        conv_weights: ``[K_i, C_i, R_i, R_i]``; the padding is ``R_i // 2``.
        weights, biases, running_means, running_vars: of the batch normalisations, ``[K_i]``.
        training, momentum, eps, group: as in :func:`batch_norm_relu`, the same for all six.

    Returns:
        ``[N, K_0 + K_2 + K_4 + K_5, H, W]``.
    """

    def conv(i: int, y: Tensor) -> Tensor:
        return conv_bn_relu(
            y,
            conv_weights[i],
            weights[i],
            biases[i],
            running_means[i],
            running_vars[i],
            training,
            momentum,
            eps,
            padding=conv_weights[i].shape[-1] // 2,
            group=group,
        )

    def pool(y: Tensor) -> Tensor:
        return max_pool(y, 3, 1, padding=1, ceil_mode=True)

    return torch.cat([conv(0, x), conv(2, conv(1, x)), conv(4, conv(3, x)), conv(5, pool(x))], 1)


def lrn(
    x: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response normalisation across channels (Krizhevsky et al., 2012, section 3.3).

    ``y[c] = x[c] / (k + alpha / size * sum(x[j] ** 2)) ** beta`` with j over the ``size`` channels
    centred on c, those beyond the ends counting as zero.
    """
    return F.local_response_norm(x, size, alpha, beta, k)


def aux_pool(x: Tensor, output_size: int = 4, kernel_size: int = 0, stride: int = 1) -> Tensor:
    """Average pool, ``[N, C, H, W]`` -> ``[N, C, output_size, output_size]``.

    Cell i averages rows ``i * stride`` up to ``i * stride + kernel_size``, which have to exist; or,
    adaptively where ``kernel_size`` is 0, rows ``floor(i * H / output_size)`` up to
    ``ceil((i + 1) * H / output_size)``. Columns likewise. Written as one mean a cell, so that its
    backward has no atomics and is deterministic on every device.
    """

    def windows(length: int) -> list[slice]:
        if kernel_size:
            return [slice(i * stride, i * stride + kernel_size) for i in range(output_size)]
        return [
            slice(i * length // output_size, -(-(i + 1) * length // output_size))
            for i in range(output_size)
        ]

    cells = [
        x[..., r, c].mean((-2, -1)) for r in windows(x.shape[-2]) for c in windows(x.shape[-1])
    ]
    return torch.stack(cells, -1).unflatten(-1, (output_size, output_size))
