"""Groups of weight gradients for the tests of conv_wgrad: operands, the call, the expectation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from closeness import NOISE_FLOOR_EPS, assert_as_good_as_eager
from conv_cases import MATH, Geometry, assert_within_tf32, to_tf32
from kernel_devices import arranged, kernel_ops, torch_device
from torch import Tensor

# Of products of 16 pixels each, in a row, before a block lays its sums aside (wgrad_plan.h).
CHAIN_ADDITIONS = 2048 // 16


@dataclass(frozen=True)
class Wgrad(Geometry):
    """One problem; ``x`` and ``grad`` are ARRANGEMENTS."""

    prologue: str = "none"  # or batch_norm, pool
    x: str = "channels_last"
    grad: str = "channels_last"
    out: str = "contiguous"  # or channels_last, sliced
    master: bool = False  # float32 results


@dataclass
class Operands:
    """Of one problem, dense and on the CPU."""

    grad: Tensor
    x: Tensor
    batch_norm: Tensor  # float32 [4, C]: mean, rstd, weight, bias; or [0]


def operands(case: Wgrad, dtype: torch.dtype, seed: int = 0) -> Operands:
    """Random, with results of about 1."""
    generator = torch.Generator().manual_seed(seed)
    p, q = case.output_size
    scale = max(1, case.n * p * q) ** -0.5
    grad = (torch.randn(case.n, case.k, p, q, generator=generator) * scale).to(dtype)
    x = torch.randn(case.n, case.c, case.h, case.w, generator=generator).to(dtype)
    batch_norm = torch.empty(0)
    if case.prologue == "batch_norm":
        batch_norm = torch.randn(4, case.c, generator=generator)
        batch_norm[1].abs_().add_(0.5)
    return Operands(grad, x, batch_norm)


def group_operands(cases: Sequence[Wgrad], dtype: torch.dtype, seed: int = 0) -> list[Operands]:
    return [operands(case, dtype, seed + i) for i, case in enumerate(cases)]


def result(case: Wgrad, filters: int, dtype: torch.dtype, device: str) -> Tensor:
    """Memory for one segment, full of NaN."""
    shape = (filters, case.c, *case.kernel)
    like = torch.full(shape, torch.nan, dtype=torch.float32 if case.master else dtype)
    if case.out == "sliced":  # of a wider tensor, in both directions
        wide = like.new_full((filters + 2, case.c + 3, *case.kernel), torch.nan).to(device)
        return wide[1 : 1 + filters, 2 : 2 + case.c]
    layout = torch.channels_last if case.out == "channels_last" else torch.contiguous_format
    return like.to(memory_format=layout).to(device)


def arguments(
    cases: Sequence[Wgrad],
    tensors: Sequence[Operands],
    device: str,
    exact: bool = False,
    workspace: Tensor | None = None,
) -> dict[str, Any]:
    """What the op is called with; the outputs are NaN."""
    place = torch_device(device)
    pairs = list(zip(cases, tensors, strict=True))
    return {
        "grads": [arranged(t.grad, case.grad, place) for case, t in pairs],
        "x": [arranged(t.x, case.x, place) for case, t in pairs],
        "batch_norms": [t.batch_norm.to(place) for t in tensors],
        "strides": [size for case in cases for size in case.stride],
        "paddings": [size for case in cases for size in case.padding],
        "pools": [case.prologue == "pool" for case in cases],
        "segments": [len(case.widths) for case in cases],
        "exact": exact,
        "workspace": workspace,
        "outputs": [
            result(case, width, t.x.dtype, place) for case, t in pairs for width in case.widths
        ],
    }


def run(
    cases: Sequence[Wgrad],
    tensors: Sequence[Operands],
    device: str,
    exact: bool = False,
    workspace: Tensor | None = None,
) -> list[Tensor]:
    """Each problem's result [K, C, R, S], segments put together, on the CPU."""
    call = arguments(cases, tensors, device, exact, workspace)
    assert kernel_ops(device).conv_wgrad(*call.values()) is None
    remaining = list(call["outputs"])
    results = []
    for case in cases:
        parts = [remaining.pop(0) for _ in case.widths]
        for part in parts:
            if case.out == "sliced":
                assert part._base is not None
                margin = part._base.numel() - part.numel()
                assert part._base.isnan().sum() == part.isnan().sum() + margin
        results.append(torch.cat([part.cpu() for part in parts]))
    return results


def prepared(case: Wgrad, x: Tensor, batch_norm: Tensor) -> Tensor:
    """What the convolution reads, in the dtype of x.

    Batch norm below float64 is one fused multiply-add in float32: where another rounding differs in
    the last place, one to TF32 may differ by a thousand times that.
    """
    if case.prologue == "pool":
        return F.max_pool2d(x, 3, 1, 1)
    if case.prologue == "batch_norm":
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, rstd, weight, bias = (v.view(1, -1, 1, 1) for v in batch_norm.to(dtype))
        factors = (x.to(dtype) - mean, weight * rstd, bias)
        centred, scale, shift = (v.double() for v in factors)
        return (centred * scale + shift).to(dtype).relu().to(x.dtype)
    return x


def plain(case: Wgrad, grad: Tensor, x: Tensor) -> Tensor:
    """The weight gradient by torch, for an x that is prepared, in its dtype."""
    shape = (case.k, case.c, *case.kernel)
    return torch.nn.grad.conv2d_weight(x, shape, grad, case.stride, case.padding)


def by_windows(case: Wgrad, grad: Tensor, x: Tensor) -> Tensor:
    """The same in float64, with every product: zeros of the padding times NaN too."""
    windows = F.unfold(x.double(), case.kernel, padding=case.padding, stride=case.stride)
    dw = torch.einsum("nkm,njm->kj", grad.double().flatten(2), windows)
    return dw.view(case.k, case.c, *case.kernel)


def assert_right(case: Wgrad, tensors: Operands, dw: Tensor, math: str, device: str) -> None:
    """The error against float64 is at most twice eager's, plus the noise floor.

    Float32 results of 16-bit factors are held to eager float32 on the same factors, which is far
    nearer than eager in 16 bits; their floor are the errors of a chain of sums. TF32: the twin
    is eager float32 on factors rounded to TF32, and so is the reference in float64: the product of
    two 11-bit mantissas is exact in float32, so that sums are all that may differ. On a GPU the
    result is held to its bound for the factors as they are.
    """
    x = prepared(case, tensors.x, tensors.batch_norm)
    grad = tensors.grad
    if math == "tf32" and device != "emulator":
        exact = plain(case, grad.double(), x.double())
        magnitude = plain(case, grad.double().abs(), x.double().abs())
        p, q = case.output_size
        assert_within_tf32(dw, exact, magnitude, case.n * p * q)
        return
    if math == "tf32":
        x, grad = to_tf32(x), to_tf32(grad)
        reference = plain(case, grad.double(), x.double())
    else:
        reference = plain(
            case, grad.double(), prepared(case, tensors.x.double(), tensors.batch_norm)
        )
    if case.master:
        x, grad = x.float(), grad.float()
        reference = plain(case, grad.double(), x.double())
    eager = plain(case, grad, x)
    floor = NOISE_FLOOR_EPS * torch.finfo(dw.dtype).eps
    if case.master:
        floor = CHAIN_ADDITIONS**0.5 * torch.finfo(dw.dtype).eps
    assert_as_good_as_eager(dw, eager, reference, floor, str(case))


def check(
    cases: Sequence[Wgrad],
    math: str,
    device: str,
    workspace: Tensor | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Runs a group on random operands and holds each result to :func:`assert_right`."""
    dtype, exact = MATH[math]
    tensors = group_operands(cases, dtype, seed)
    results = run(cases, tensors, device, exact, workspace)
    for case, t, dw in zip(cases, tensors, results, strict=True):
        assert_right(case, t, dw, math, device)
    return results
