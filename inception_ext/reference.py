"""Every op of this package in plain PyTorch, with the signature of its fused counterpart.

These functions are the definition of what the kernels compute, the path for whatever the kernels
do not take (float64, second derivatives, functorch transforms, ...), and the oracle of the tests.
Activations are ``[N, C, H, W]`` in any memory format and any floating dtype.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from inception_ext import _process_group
from inception_ext._process_group import ALONE, Group

__all__ = [
    "aux_pool",
    "batch_norm_relu",
    "conv3x3",
    "conv_bn_relu",
    "conv_chain",
    "conv_group",
    "conv_wgrad",
    "folded_inception",
    "global_avg_pool",
    "inception",
    "lrn",
    "lrn_out",
    "max_pool",
    "max_pool_out",
    "pack_weight",
    "stem_conv_conv_pool",
    "stem_conv_pool",
    "unpack_weight",
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
    else:
        y = F.batch_norm(x, *vectors, training, momentum, eps)
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


# The ops of inference. They write into tensors that the caller gives, and take folded weights.


def pack_weight(weight: Tensor) -> Tensor:
    """``[K, C, R, S]`` to ``[K, ceil8(R * S * C)]``: row k is filter k in (r, s, c) order, then 0.

    So the filter's row r lies as the pixels of a channels_last image do, and rows are a whole
    number of 16-byte vectors.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(rows, (0, -rows.shape[1] % 8)).contiguous()


def unpack_weight(packed: Tensor, channels: int, kernel_size: Sequence[int]) -> Tensor:
    """What :func:`pack_weight` packed: ``[K, channels, R, S]``."""
    r, s = kernel_size
    return packed[:, : r * s * channels].unflatten(1, (r, s, channels)).permute(0, 3, 1, 2)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """Convolution with a packed weight; sums in float32 (float64 where x is), not rounded yet."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    filters = unpack_weight(weight, x.shape[1], kernel_size).to(dtype)
    return F.conv2d(x.to(dtype), filters, bias.to(dtype), tuple(stride), tuple(padding))


def conv_group(
    x: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    kernel_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    pools: Sequence[bool],
    relus: Sequence[bool],
    segments: Sequence[int],
    exact: bool,
    workspace: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Convolution + bias + ReLU, several at once, each into one to three outputs.

    Args:
        x: of problem i ``[N, C, H, W]``.
        weights: ``[K, ceil8(R * S * C)]`` as :func:`pack_weight` gives them, in the dtype of x.
        biases: ``[K]``, float32.
        kernel_sizes, strides, paddings: ``(h, w)`` of problem 0, ``(h, w)`` of problem 1, ...
        pools: where True, x is max pooled first: 3x3, stride 1, padding 1.
        relus: where False, the sum is written as it is.
        segments: how many of ``outputs``, in turn, share the K channels of problem i.
        exact: float32 is multiplied as float32; otherwise a kernel may round factors to TF32.
        workspace: memory for kernels; not used here.
        outputs: ``[N, K_j, P, Q]``, written to.
    """
    remaining = list(outputs)
    for i in range(len(x)):
        window = (sizes[2 * i : 2 * i + 2] for sizes in (kernel_sizes, strides, paddings))
        y = _conv(max_pool(x[i], 3, 1, 1) if pools[i] else x[i], weights[i], biases[i], *window)
        parts, remaining = remaining[: segments[i]], remaining[segments[i] :]
        widths = [part.shape[1] for part in parts]
        for part, values in zip(
            parts, (F.relu(y) if relus[i] else y).split(widths, 1), strict=True
        ):
            part.copy_(values)


def conv_wgrad(
    grads: Sequence[Tensor],
    x: Sequence[Tensor],
    batch_norms: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    pools: Sequence[bool],
    segments: Sequence[int],
    exact: bool,
    workspace: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Gradients of the weights of convolutions, several at once, each into one to three outputs.

    Args:
        grads: gradients of the convolutions' outputs, of problem i ``[N, K, P, Q]``.
        x: what they read, ``[N, C, H, W]``.
        batch_norms: ``[4, C]``, float32: mean, 1 / standard deviation, weight and bias of a batch
            norm + ReLU between x and the convolution; ``[0]``: there is none.
        strides, paddings: ``(h, w)`` of problem 0, ``(h, w)`` of problem 1, ...
        pools: where True, x is max pooled first: 3x3, stride 1, padding 1.
        segments: how many of ``outputs``, in turn, share the K filters of problem i.
        exact: float32 is multiplied as float32; otherwise a kernel may round factors to TF32.
        workspace: memory for kernels; not used here.
        outputs: ``[K_j, C, R, S]``, in the dtype of x or float32, written to.
    """
    remaining = list(outputs)
    for i in range(len(x)):
        read = max_pool(x[i], 3, 1, 1) if pools[i] else x[i]
        dtype = torch.promote_types(read.dtype, torch.float32)
        if batch_norms[i].numel():
            mean, rstd, weight, bias = (v.view(1, -1, 1, 1) for v in batch_norms[i].to(dtype))
            read = F.relu((read.to(dtype) - mean) * (weight * rstd) + bias).to(read.dtype)
        parts, remaining = remaining[: segments[i]], remaining[segments[i] :]
        filters = [part.shape[0] for part in parts]
        shape = (sum(filters), *parts[0].shape[1:])
        stride, padding = strides[2 * i : 2 * i + 2], paddings[2 * i : 2 * i + 2]
        dw = conv2d_weight(read.to(dtype), shape, grads[i].to(dtype), tuple(stride), tuple(padding))
        for part, values in zip(parts, dw.split(filters), strict=True):
            part.copy_(values)


def folded_inception(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    widths: Sequence[int],
    branch3_kernel_size: int = 3,
) -> Tensor:
    """:func:`inception` in evaluation mode, with the batch norms folded into the convolutions.

    Args:
        x: ``[N, C, H, W]``.
        weights: packed (:func:`pack_weight`), in the dtype of x: the three convolutions 1x1 that
            read x as one of ``sum(widths)`` channels, the 3x3, the 5x5, and the one of the pool.
        biases: of these, ``[K]`` each, float32.
        widths: channels that go to the output, to the 3x3 convolution and to the 5x5 one.
        branch3_kernel_size: of the "5x5" convolution.

    Returns:
        ``[N, widths[0] + K_3x3 + K_5x5 + K_pool, H, W]``.
    """

    def conv(i: int, y: Tensor, size: int = 1) -> Tensor:
        padding = (size // 2, size // 2)
        z = _conv(y, weights[i], biases[i], (size, size), padding=padding)
        return F.relu(z).to(x.dtype)

    y1, y3, y5 = conv(0, x).split(list(widths), 1)
    pooled = conv(3, max_pool(x, 3, 1, 1))
    return torch.cat([y1, conv(1, y3, 3), conv(2, y5, branch3_kernel_size), pooled], 1)


def stem_conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    exact: bool,
    y: Tensor,
) -> None:
    """Convolution 7x7, stride 2, padding 3 + ReLU, then max pool 3x3, stride 2, ceil mode.

    Args:
        x: ``[N, 3, H, W]`` in any strides, uint8 or floating.
        weight: ``[64, 152]``, packed; its dtype is that of the computation. bias: ``[64]`` float32.
        scale, shift: 3 numbers each: the convolution reads ``x * scale + shift``, rounded to the
            dtype of the weight, and pads that with zeros.
        exact: as in :func:`conv_group`.
        y: ``[N, 64, P, Q]``, written to.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    vectors = [torch.tensor(v, dtype=dtype, device=x.device).view(3, 1, 1) for v in (scale, shift)]
    images = (x.to(dtype) * vectors[0] + vectors[1]).to(weight.dtype)
    z = F.relu(_conv(images, weight, bias, (7, 7), (2, 2), (3, 3)))
    y.copy_(max_pool(z, 3, 2, ceil_mode=True))


def stem_conv_conv_pool(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    exact: bool,
    y: Tensor,
) -> None:
    """Convolution 1x1 + ReLU, convolution 3x3 + ReLU, max pool 3x3, stride 2, ceil mode.

    Args:
        x: ``[N, 64, H, W]``.
        weight1, weight2: ``[64, 64]`` and ``[192, 576]``, packed. bias1, bias2: float32.
        exact: as in :func:`conv_group`.
        y: ``[N, 192, P, Q]``, written to.
    """
    reduced = F.relu(_conv(x, weight1, bias1, (1, 1))).to(x.dtype)
    z = F.relu(_conv(reduced, weight2, bias2, (3, 3), padding=(1, 1)))
    y.copy_(max_pool(z, 3, 2, ceil_mode=True))


def max_pool_out(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    y: Tensor,
) -> None:
    """:func:`max_pool` into y ``[N, C, P, Q]``."""
    y.copy_(F.max_pool2d(x, tuple(kernel_size), tuple(stride), tuple(padding), ceil_mode=ceil_mode))


def global_avg_pool(x: Tensor, y: Tensor) -> None:
    """Mean of each channel of ``[N, C, H, W]``, summed in float32, into y ``[N, C, 1, 1]``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y.copy_(x.to(dtype).mean((2, 3), keepdim=True))


def lrn_out(x: Tensor, size: int, alpha: float, beta: float, k: float, y: Tensor) -> None:
    """:func:`lrn`, computed in float32, into y of x's shape; the op is called ``lrn``."""
    y.copy_(lrn(x.to(torch.promote_types(x.dtype, torch.float32)), size, alpha, beta, k))
