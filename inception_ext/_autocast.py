"""What autocast would cast of a convolution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from inception_ext import _library

__all__ = ["cast", "cast_weights", "casts_in_op", "compute_dtype"]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Of a convolution of x: autocast's, or that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def cast(x: Tensor) -> Tensor:
    """x, of a kernel's dtype, as autocast would cast it for a convolution that comes first."""
    return x.to(compute_dtype(x))


def cast_weights(x: Tensor, conv_weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Weights as autocast would cast a convolution's; then x has to have its dtype already.

    On CUDA, float32 weights stay as they are where x has autocast's dtype: the op casts them.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return conv_weights
    # x itself stays as it is: where autocast would cast it, the pool would come before the cast.
    # float64 is not for autocast to change.
    kept = (torch.float32, torch.float64) if casts_in_op(x) else (torch.float64,)
    dtype = compute_dtype(x)
    return [w if w.dtype in kept else w.to(dtype) for w in conv_weights]


def casts_in_op(x: Tensor) -> bool:
    """Whether ops take float32 weights for x, because autocast would cast them."""
    return (
        _library.device_type(x) == "cuda"
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype == compute_dtype(x)
    )
