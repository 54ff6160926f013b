"""Loads the compiled ops (``_C``) and tells torch what it cannot see in them.

Importing this module registers ``torch.ops.inception_ext.*``, their fake (meta) kernels and their
flop formulas. Where ``_C`` is missing or does not load, one warning says so, the package runs on
its reference path, and :func:`load_error` keeps the reason; under ``INCEPTION_EXT_REQUIRE=1`` it is
an ImportError instead.
"""

import functools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inception_ext import _process_group
from inception_ext._version import __version__

__all__ = [
    "build_info",
    "covering_architecture",
    "is_available",
    "load_error",
    "pool_size",
    "why_not_on",
]

_load_error: str | None = None


def _do_without(error: Exception) -> None:
    """Says that the binary is of no use, and why."""
    global _C, _load_error
    _C = None
    _load_error = str(error)
    message = (
        f"inception_ext: the compiled kernels are missing ({error}); everything runs on the plain "
        "PyTorch path. Build them with 'pip install --no-build-isolation .' in a source checkout."
    )
    if os.environ.get("INCEPTION_EXT_REQUIRE") == "1":
        raise ImportError(f"{message} (INCEPTION_EXT_REQUIRE=1 makes this an error)") from error
    warnings.warn(message, RuntimeWarning, stacklevel=3)


try:
    from inception_ext import _C  # type: ignore[attr-defined]
except ImportError as error:
    _do_without(error)


# Whether the CUDA kernels run on the emulator, in the place of the CPU's: see testing.emulated.
_emulated = False


def set_emulated(emulated: bool) -> bool:
    """Turns emulation on or off for the whole process; what it was before."""
    global _emulated
    before = _emulated
    _emulated = emulated
    return before


def device_type(x: Tensor) -> str:
    """The device whose kernels serve ``x``: ``"cuda"`` for a CPU tensor under emulation."""
    return "cuda" if _emulated and x.device.type == "cpu" else x.device.type


def ops(x: Tensor) -> Any:
    """The namespace of the ops that serve ``x``."""
    if _emulated and x.device.type == "cpu":
        return torch.ops.inception_ext_emulated
    return torch.ops.inception_ext


def is_available() -> bool:
    """Whether the compiled ops are loaded."""
    return _C is not None


def load_error() -> str | None:
    """Why the compiled ops did not load, or None."""
    return _load_error


def build_info() -> dict[str, Any]:
    """What the binary holds.

    Returns:
        ``version``; ``cuda``: the toolkit's version, or None; ``architectures``: list such as
        ``["sm_90a", "compute_120"]``; ``cpu_isa``: what the CPU kernels use on this machine;
        ``torch_built_with``. All but ``version`` are None or empty without the binary.
    """
    if _C is None:
        return {
            "version": __version__,
            "cuda": None,
            "architectures": [],
            "cpu_isa": None,
            "torch_built_with": None,
        }
    info: dict[str, Any] = _C.build_info()
    info["cuda"] = info["cuda"] or None
    info["architectures"] = [a for a in info["architectures"].split(",") if a]
    return info


def covering_architecture(architectures: Sequence[str], capability: str) -> str | None:
    """Which of a binary's code objects a device runs, or None.

    Machine code runs on its own major version from its minor version up (``sm_80`` on 8.6), PTX
    on everything from its version up; with the suffix ``a`` either runs on its very version only,
    with ``f`` on its family, which is taken as its major version.

    Args:
        architectures: such as ``["sm_80", "sm_90a", "compute_120"]``.
        capability: of the device, such as ``"9.0"``.
    """
    major, minor = (int(part) for part in capability.split("."))
    best: tuple[bool, int, str] | None = None
    for name in architectures:
        parsed = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not parsed:
            continue
        kind, its_major, its_minor, suffix = (
            parsed[1],
            int(parsed[2]),
            int(parsed[3]),
            parsed[4],
        )
        if suffix == "a":
            runs = (its_major, its_minor) == (major, minor)
        elif suffix == "f" or kind == "sm":
            runs = its_major == major and its_minor <= minor
        else:
            runs = (its_major, its_minor) <= (major, minor)
        if runs:  # machine code before PTX, then the newest
            rank = (kind == "sm", its_major * 10 + its_minor, name)
            best = rank if best is None else max(best, rank)
    return best[2] if best else None


@functools.cache
def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the binary's CUDA kernels do not run on a device of this capability, or None."""
    info = build_info()
    if not info["cuda"]:
        return "the binary was built without CUDA"
    text = "{}.{}".format(*capability)
    if covering_architecture(info["architectures"], text) is None:
        return f"the binary has no code for capability {text}: {', '.join(info['architectures'])}"
    return None


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


def pool_size(size: Any, kernel: int, stride: int, padding: int, ceil_mode: bool) -> Any:
    """Height or width of a max pool's output, by torch's rule; below 1 there is none."""
    if not ceil_mode:
        return (size + 2 * padding - kernel) // stride + 1
    # In ceil mode the last window must start inside the input or its left padding.
    windows = (size + 2 * padding - kernel + stride - 1) // stride + 1
    return torch.sym_min(windows, (size + padding - 1) // stride + 1)


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
        pool_size(size, kernel_size[i], stride[i], padding[i], ceil_mode)
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
    nothing = x.new_empty
    dx = _nhwc(x, *x.shape) if needs[0] else nothing(0)
    conv_weight_grads = [
        _in_layout_of(weight) if need else nothing(0)
        for weight, need in zip(conv_weights, needs[1:], strict=True)
    ]
    return (
        dx,
        conv_weight_grads,
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
        h, w = (pool_size(size, weight.shape[2], stride, padding, False) for size in (h, w))
        raw.append(_nhwc(x, n, weight.shape[0], h, w))
    if pool:
        kernel, stride, padding, ceil_mode = pool
        h, w = (pool_size(size, kernel, stride, padding, bool(ceil_mode)) for size in (h, w))
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
    return (
        _nhwc(x, *x.shape) if needs[0] else x.new_empty(0),
        [
            _in_layout_of(weight) if need else x.new_empty(0)
            for weight, need in zip(conv_weights, needs[1:], strict=True)
        ],
        _vector_gradients(weights, affine),
        _vector_gradients(biases, affine),
    )


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
    """Two floating-point operations a multiply-accumulate; shapes, not tensors, come in."""
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
    """Multiply-accumulates of each convolution; shapes, not tensors, come in."""
    n, _c, h, w = x
    macs = []
    for (k, c, r, s), stride, padding in zip(conv_weights, strides, paddings, strict=True):
        h, w = ((size + 2 * padding - r) // stride + 1 for size in (h, w))
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
    """Tells torch the fake kernels and the flop formulas of one namespace of the ops, and the ops
    what they call in Python."""
    _process_group.implement(namespace)

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


if _C is not None:
    try:
        register("inception_ext")
    except RuntimeError as error:  # torch names the op that is not there
        _do_without(ImportError(f"{_C.__file__} was built from other sources: {error}"))
