"""Flop formulas of the compiled ops, two operations a multiply-accumulate.

They get shapes in the place of tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from inception_ext._windows import output_size

__all__ = ["register"]


def _conv_group_flop(
    x: list[Any],
    weights: list[Any],
    biases: Any,
    kernel_sizes: list[int],
    *rest: Any,
    **_: Any,
) -> int:
    segments, outputs = rest[4], rest[7]
    flops, first = 0, 0
    for i, (_n, c, _h, _w) in enumerate(x):
        n, _k, p, q = outputs[first]
        r, s = kernel_sizes[2 * i : 2 * i + 2]
        flops += 2 * n * p * q * weights[i][0] * c * r * s
        first += segments[i]
    return flops


def _stem_conv_pool_flop(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    n, c, h, w = x
    return 2 * n * ((h + 1) // 2) * ((w + 1) // 2) * weight[0] * c * 7 * 7


def _stem_conv_conv_pool_flop(
    x: Any, weight1: Any, bias1: Any, weight2: Any, *_: Any, **__: Any
) -> int:
    n, c, h, w = x
    return 2 * n * h * w * (weight1[0] * c + weight2[0] * weight1[0] * 3 * 3)


def _conv_wgrad_flop(grads: list[Any], x: Any, *rest: Any, **_: Any) -> int:
    segments, outputs = rest[4], rest[7]
    flops, first = 0, 0
    for i, (n, k, p, q) in enumerate(grads):
        _k, c, r, s = outputs[first]
        flops += 2 * n * p * q * k * c * r * s
        first += segments[i]
    return flops


def _inception_flop(x: Any, conv_weights: list[Any], *_: Any, **__: Any) -> int:
    n, _c, h, w = x
    return sum(2 * n * h * w * k * c * r * s for k, c, r, s in conv_weights)


def _inception_backward_flop(
    grad: Any, x: Any, conv_weights: list[Any], *rest: Any, **_: Any
) -> int:
    n, _c, h, w = x
    needs = rest[13]  # behind weights, biases, the eleven tensors of the forward, and training
    needs_input = (needs[0], needs[0], True, needs[0], True, needs[0])
    return sum(
        2 * n * h * w * k * c * r * s * (int(of_input) + int(of_weight))
        for (k, c, r, s), of_input, of_weight in zip(
            conv_weights, needs_input, needs[1:], strict=True
        )
    )


def _chain_macs(
    x: Any, conv_weights: Sequence[Any], strides: Sequence[int], paddings: Sequence[int]
) -> list[int]:
    """Multiply-accumulates of each convolution."""
    n, _c, h, w = x
    macs = []
    for (k, c, r, s), stride, padding in zip(conv_weights, strides, paddings, strict=True):
        h, w = (output_size(size, r, stride, padding) for size in (h, w))
        macs.append(n * h * w * k * c * r * s)
    return macs


def _conv3x3_flop(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * sum(_chain_macs(x, [weight], [1], [1]))


def _conv3x3_backward_flop(grad: Any, x: Any, weight: Any, needs: Any, **_: Any) -> int:
    return _conv3x3_flop(x, weight) * (int(needs[0]) + int(needs[1]))


def _conv_chain_flop(x: Any, conv_weights: list[Any], *rest: Any, **_: Any) -> int:
    return 2 * sum(_chain_macs(x, conv_weights, rest[4], rest[5]))


def _conv_chain_backward_flop(
    grad: Any, x: Any, conv_weights: list[Any], *rest: Any, **_: Any
) -> int:
    strides, paddings, needs = rest[7], rest[8], rest[11]
    macs = _chain_macs(x, conv_weights, strides, paddings)
    of_input = [needs[0], *(True for _ in macs[1:])]
    return 2 * sum(
        count * (int(a) + int(b)) for count, a, b in zip(macs, of_input, needs[1:], strict=True)
    )


def register(namespace: str) -> None:
    """Gives torch the flop formulas of one namespace of the ops."""
    ops = getattr(torch.ops, namespace)
    for name, formula in (
        ("conv3x3_forward", _conv3x3_flop),
        ("conv3x3_backward", _conv3x3_backward_flop),
        ("inception_forward", _inception_flop),
        ("inception_backward", _inception_backward_flop),
        ("conv_chain_forward", _conv_chain_flop),
        ("conv_chain_backward", _conv_chain_backward_flop),
        ("conv_group", _conv_group_flop),
        ("conv_wgrad", _conv_wgrad_flop),
        ("stem_conv_pool", _stem_conv_pool_flop),
        ("stem_conv_conv_pool", _stem_conv_conv_pool_flop),
    ):
        register_flop_formula(getattr(ops, name))(formula)
