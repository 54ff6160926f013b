"""Fake (meta) kernels of the compiled ops: the sizes, dtypes and layouts of what they return."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inception_ext._windows import output_size

__all__ = ["INFERENCE_OPS", "register"]

# Those that write into tensors of the caller.
INFERENCE_OPS = (
    *("conv_group", "stem_conv_pool", "stem_conv_conv_pool"),
    *("max_pool_out", "global_avg_pool", "lrn"),
)


def _nhwc(like: Tensor, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        size,
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _in_layout_of(weight: Tensor) -> Tensor:
    """channels_last where the weight is, else contiguous."""
    is_nhwc = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    return _nhwc(weight, *weight.shape) if is_nhwc else weight.new_empty(weight.shape)


def _max_pool_forward_fake(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    with_argmax: bool,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    p, q = (
        output_size(size, kernel_size[i], stride[i], padding[i], ceil_mode)
        for i, size in enumerate((h, w))
    )
    y = _nhwc(x, n, c, p, q)
    argmax = (
        _nhwc(x, n, c, p, q, dtype=torch.uint8)
        if with_argmax
        else x.new_empty(0, dtype=torch.uint8)
    )
    return y, argmax


def _max_pool_backward_fake(
    grad: Tensor,
    argmax: Tensor,
    input_size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    return _nhwc(grad, grad.shape[0], grad.shape[1], *input_size)


def _batch_norm_relu_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    mean = x.new_empty(channels, dtype=torch.float32)
    return _nhwc(x, *x.shape), mean, torch.empty_like(mean)


def _batch_norm_relu_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    affine: bool = True,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = _vector_gradients([weight, bias], affine)
    return _nhwc(x, *x.shape), dweight, dbias


def _vector_gradients(vectors: list[Tensor], affine: bool) -> list[Tensor]:
    return [torch.empty_like(v) if affine else v.new_empty(0) for v in vectors]


def _conv3x3_forward_fake(x: Tensor, weight: Tensor) -> Tensor:
    return _nhwc(x, x.shape[0], weight.shape[0], *x.shape[2:])


def _conv3x3_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    return (
        _nhwc(x, *x.shape) if needs[0] else x.new_empty(0),
        _in_layout_of(weight) if needs[1] else x.new_empty(0),
    )


def _inception_forward_fake(
    recomputes: bool,
    x: Tensor,
    conv_weights: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    training: bool,
    momentum: float,
    eps: float,
    save: bool,
    exact: bool = True,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, ...]:
    """``recomputes``: whether the kernels are CUDA's, which keep less for the backward."""
    n, c, h, w = x.shape
    k = [weight.shape[0] for weight in conv_weights]
    out = _nhwc(x, n, k[0] + k[2] + k[4] + k[5], h, w)
    if not save:
        nothing = [x.new_empty(0) for _ in range(7)]
        statistics = [x.new_empty(0, dtype=torch.float32) for _ in range(2)]
        return out, *nothing, x.new_empty(0, dtype=torch.uint8), *statistics
    # raw_1x1, raw_3x3, raw_5x5, raw_pool, reduced_3x3, reduced_5x5, pooled
    saved = [
        _nhwc(x, n, size, h, w) for size in (k[0] + k[1] + k[3], k[2], k[4], k[5], k[1], k[3], c)
    ]
    if recomputes:
        saved[4:] = [x.new_empty(0) for _ in range(3)]
    argmax = _nhwc(x, n, c, h, w, dtype=torch.uint8)
    statistics = [x.new_empty(sum(k), dtype=torch.float32) for _ in range(2)]
    return out, *saved, argmax, *statistics


def _inception_backward_fake(
    grad: Tensor,
    x: Tensor,
    conv_weights: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    raw_1x1: Tensor,
    raw_3x3: Tensor,
    raw_5x5: Tensor,
    raw_pool: Tensor,
    reduced_3x3: Tensor,
    reduced_5x5: Tensor,
    pooled: Tensor,
    argmax: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    needs: list[bool],
    exact: bool = True,
    affine: bool = True,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    return _gradients(x, conv_weights, weights, biases, needs, affine)


def _gradients(
    x: Tensor,
    conv_weights: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    needs: list[bool],
    affine: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Those of convolutions with batch norms; ``needs``: of x, then of each convolution."""
    return (
        _nhwc(x, *x.shape) if needs[0] else x.new_empty(0),
        [
            _in_layout_of(weight) if need else x.new_empty(0)
            for weight, need in zip(conv_weights, needs[1:], strict=True)
        ],
        _vector_gradients(weights, affine),
        _vector_gradients(biases, affine),
    )


def _conv_chain_forward_fake(
    x: Tensor,
    conv_weights: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    strides: list[int],
    paddings: list[int],
    pool: list[int],
    training: bool,
    momentum: float,
    eps: float,
    save: bool,
    exact: bool = True,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, ...]:
    n, _, h, w = x.shape
    raw = []
    for weight, stride, padding in zip(conv_weights, strides, paddings, strict=True):
        h, w = (output_size(size, weight.shape[2], stride, padding) for size in (h, w))
        raw.append(_nhwc(x, n, weight.shape[0], h, w))
    if pool:
        kernel, stride, padding, ceil_mode = pool
        h, w = (output_size(size, kernel, stride, padding, bool(ceil_mode)) for size in (h, w))
    y = _nhwc(x, n, conv_weights[-1].shape[0], h, w)
    channels = sum(weight.shape[0] for weight in conv_weights)
    statistics = [x.new_empty(channels if save else 0, dtype=torch.float32) for _ in range(2)]
    saved = [x.new_empty(0), x.new_empty(0)]
    argmax = x.new_empty(0, dtype=torch.uint8)
    if save:
        saved[: len(raw)] = raw
        argmax = _nhwc(x, *y.shape, dtype=torch.uint8) if pool else argmax
    return y, *saved, argmax, *statistics


def _conv_chain_backward_fake(
    grad: Tensor,
    x: Tensor,
    conv_weights: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    raw1: Tensor,
    raw2: Tensor,
    argmax: Tensor,
    mean: Tensor,
    rstd: Tensor,
    strides: list[int],
    paddings: list[int],
    pool: list[int],
    training: bool,
    needs: list[bool],
    exact: bool = True,
    affine: bool = True,
    group_name: str = "",
    group_size: int = 1,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    return _gradients(x, conv_weights, weights, biases, needs, affine)


def _aux_pool_forward_fake(x: Tensor, output_size: int, kernel_size: int, stride: int) -> Tensor:
    return _nhwc(x, x.shape[0], x.shape[1], output_size, output_size)


def _aux_pool_backward_fake(
    grad: Tensor, input_size: list[int], kernel_size: int, stride: int
) -> Tensor:
    return _nhwc(grad, grad.shape[0], grad.shape[1], *input_size)


def _lrn_backward_fake(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    return _nhwc(x, *x.shape)


def _image_to_nhwc_fake(
    x: Tensor, scale: list[float], shift: list[float], dtype: torch.dtype
) -> Tensor:
    return _nhwc(x, *x.shape, dtype=dtype)


def _copy_channels_fake(y: Tensor, x: Tensor, offset: int) -> None:
    return None


def _writes_only(*args: Any) -> None:
    """The fake kernel of ops that write into tensors of the caller."""
    return None


def register(namespace: str) -> None:
    """Gives torch the fake kernels of one namespace of the ops."""

    def inception_forward_fake(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        recomputes = namespace == "inception_ext_emulated" or x.device.type == "cuda"
        return _inception_forward_fake(recomputes, x, *args, **kwargs)

    fakes: tuple[tuple[str, Callable[..., Any]], ...] = (
        ("max_pool_forward", _max_pool_forward_fake),
        ("max_pool_backward", _max_pool_backward_fake),
        ("batch_norm_relu_forward", _batch_norm_relu_forward_fake),
        ("batch_norm_relu_backward", _batch_norm_relu_backward_fake),
        ("conv3x3_forward", _conv3x3_forward_fake),
        ("conv3x3_backward", _conv3x3_backward_fake),
        ("inception_forward", inception_forward_fake),
        ("inception_backward", _inception_backward_fake),
        ("conv_chain_forward", _conv_chain_forward_fake),
        ("conv_chain_backward", _conv_chain_backward_fake),
        ("aux_pool_forward", _aux_pool_forward_fake),
        ("aux_pool_backward", _aux_pool_backward_fake),
        ("lrn_backward", _lrn_backward_fake),
        ("image_to_nhwc", _image_to_nhwc_fake),
        ("copy_channels", _copy_channels_fake),
        *((name, _writes_only) for name in (*INFERENCE_OPS, "conv_wgrad")),
    )
    for name, fake in fakes:
        torch.library.register_fake(f"{namespace}::{name}", fake)
