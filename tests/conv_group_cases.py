"""Groups of convolutions for the tests of conv_group: operands, the call, what it has to give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from closeness import NOISE_FLOOR_EPS, assert_as_good_as_eager
from conv_cases import MATH, Geometry, assert_within_tf32, to_tf32
from kernel_devices import arranged, assert_margin_untouched, kernel_ops, torch_device
from torch import Tensor

from inception_ext.reference import pack_weight


@dataclass(frozen=True)
class Conv(Geometry):
    """One problem; ``x`` and ``y`` are ARRANGEMENTS."""

    pool: bool = False
    relu: bool = True
    x: str = "channels_last"
    y: str = "channels_last"


@dataclass
class Operands:
    """Of one problem, dense and on the CPU."""

    x: Tensor
    weight: Tensor  # [K, C, R, S]
    bias: Tensor  # float32 of values that the dtype has: eager adds it in that


def operands(conv: Conv, dtype: torch.dtype, seed: int = 0) -> Operands:
    """Random, with outputs of about 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = (conv.k, conv.c, *conv.kernel)
    scale = (conv.c * conv.kernel[0] * conv.kernel[1]) ** -0.5
    x = torch.randn(conv.n, conv.c, conv.h, conv.w, generator=generator).to(dtype)
    weight = (torch.randn(shape, generator=generator) * scale).to(dtype)
    bias = torch.randn(conv.k, generator=generator).to(dtype).float()
    return Operands(x, weight, bias)


def group_operands(convs: Sequence[Conv], dtype: torch.dtype, seed: int = 0) -> list[Operands]:
    return [operands(conv, dtype, seed + i) for i, conv in enumerate(convs)]


def arguments(
    convs: Sequence[Conv],
    tensors: Sequence[Operands],
    device: str,
    exact: bool = False,
    workspace: Tensor | None = None,
) -> dict[str, Any]:
    """What the op is called with; the outputs are NaN."""
    place = torch_device(device)
    outputs = [
        arranged(t.x.new_full((conv.n, width, *conv.output_size), torch.nan), conv.y, place)
        for conv, t in zip(convs, tensors, strict=True)
        for width in conv.widths
    ]
    return {
        "x": [arranged(t.x, conv.x, place) for conv, t in zip(convs, tensors, strict=True)],
        "weights": [pack_weight(t.weight).to(place) for t in tensors],
        "biases": [t.bias.to(place) for t in tensors],
        "kernel_sizes": [size for conv in convs for size in conv.kernel],
        "strides": [size for conv in convs for size in conv.stride],
        "paddings": [size for conv in convs for size in conv.padding],
        "pools": [conv.pool for conv in convs],
        "relus": [conv.relu for conv in convs],
        "segments": [len(conv.widths) for conv in convs],
        "exact": exact,
        "workspace": workspace,
        "outputs": outputs,
    }


def run(
    convs: Sequence[Conv],
    tensors: Sequence[Operands],
    device: str,
    exact: bool = False,
    workspace: Tensor | None = None,
) -> list[Tensor]:
    """Each problem's output [N, K, P, Q], segments put together, on the CPU."""
    call = arguments(convs, tensors, device, exact, workspace)
    assert kernel_ops(device).conv_group(*call.values()) is None
    remaining = list(call["outputs"])
    results = []
    for conv in convs:
        parts = [remaining.pop(0) for _ in conv.widths]
        for part in parts:
            assert_margin_untouched(part)
        results.append(torch.cat([part.cpu() for part in parts], 1))
    return results


def plain(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by torch, in the dtype of x."""
    if conv.pool:
        x = F.max_pool2d(x, 3, 1, 1)
    y = F.conv2d(x, weight, bias.to(x.dtype), conv.stride, conv.padding)
    return y.relu() if conv.relu else y


def assert_right(conv: Conv, tensors: Operands, y: Tensor, math: str, device: str) -> None:
    """The error against float64 is at most twice eager's, plus the noise floor.

    TF32: the twin is eager float32 on factors rounded to TF32, and so is the reference in float64:
    the product of two 11-bit mantissas is exact in float32, so that sums are all that may differ.
    On a GPU the result is held to its bound for the factors as they are.
    """
    values = (tensors.x, tensors.weight, tensors.bias)
    if math == "tf32" and device != "emulator":
        magnitude = plain(replace(conv, relu=False), *(v.double().abs() for v in values))
        exact = plain(conv, *(v.double() for v in values))
        assert_within_tf32(y, exact, magnitude, conv.c * conv.kernel[0] * conv.kernel[1])
        return
    if math == "tf32":
        values = (to_tf32(tensors.x), to_tf32(tensors.weight), tensors.bias)
    eager = plain(conv, *values)
    reference = plain(conv, *(v.double() for v in values))
    floor = NOISE_FLOOR_EPS * torch.finfo(y.dtype).eps
    assert_as_good_as_eager(y, eager, reference, floor, str(conv))


def check(
    convs: Sequence[Conv],
    math: str,
    device: str,
    workspace: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Runs a group on random operands and holds each result to :func:`assert_right`."""
    dtype, exact = MATH[math]
    tensors = group_operands(convs, dtype, seed)
    results = run(convs, tensors, device, exact, workspace)
    for conv, t, y in zip(convs, tensors, results, strict=True):
        assert_right(conv, t, y, math, device)
    return results
