"""Where the tests of CUDA kernels run: on the emulator, and on a GPU where there is one."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from inception_ext.testing import emulated, emulator_error

needs_emulator = pytest.mark.skipif(
    emulator_error() is not None, reason=f"built without the emulator: {emulator_error()}"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

each_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("emulator", marks=needs_emulator),
        pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu]),
    ],
)


def torch_device(device: str) -> str:
    """Where the tensors lie."""
    return "cpu" if device == "emulator" else device


def kernel_ops(device: str) -> Any:
    """The namespace of the ops that run the CUDA kernels."""
    return torch.ops.inception_ext_emulated if device == "emulator" else torch.ops.inception_ext


@contextmanager
def kernels_on(device: str, **settings: Any) -> Iterator[list[dict[str, Any]]]:
    """Yields the launches as :func:`inception_ext.testing.emulated` does; on a GPU none."""
    if device == "emulator":
        with emulated(**settings) as launches:
            yield launches
    else:
        yield []


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """torch's setting for float32 convolutions on CUDA: "ieee" or "tf32"."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


def exact_products() -> AbstractContextManager[None]:
    """Within it, float32 is multiplied as such."""
    return fp32_precision("ieee")


def arranged(x: Tensor, arrangement: str, device: str = "cpu") -> Tensor:
    """``x`` [N, C, H, W] in one of ARRANGEMENTS, in a buffer that is NaN (0xEE) elsewhere.

    sliced: channels of a wider channels_last tensor; misaligned: the same from an odd one on, which
    does not suit vectors; nchw: contiguous.
    """
    n, c, h, w = x.shape
    canary = torch.nan if x.is_floating_point() else 0xEE
    margin, first = {"sliced": (24, 8), "misaligned": (24, 3)}.get(arrangement, (0, 0))
    shape = (n, c, h, w) if arrangement == "nchw" else (n, h, w, c + margin)
    buffer = torch.full(shape, canary, dtype=x.dtype, device=device)
    view = buffer if arrangement == "nchw" else buffer.permute(0, 3, 1, 2)[:, first : first + c]
    return view.copy_(x)


def assert_margin_untouched(view: Tensor) -> None:
    """That the buffer around a view of :func:`arranged` is as it was; for floating dtypes."""
    buffer = view._base
    assert buffer is not None
    margin = buffer.numel() - view.numel()
    assert buffer.isnan().sum() == view.isnan().sum() + margin


ARRANGEMENTS = ["channels_last", "sliced", "misaligned", "nchw"]
