"""What the tests of the compiled ops share: who was called, and tensors of every arrangement."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16]


class CalledOps(TorchDispatchMode):
    """Within it, ``names`` collects the compiled ops that run, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "inception_ext":
            self.names.append(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=generator(seed)).to(dtype)


def _channel_slice(x: Tensor) -> Tensor:
    """Channels 3, 4, ... of a wider channels_last tensor, which is NaN elsewhere."""
    n, c, h, w = x.shape
    wide = x.new_full((n, c + 5, h, w), torch.nan).to(memory_format=torch.channels_last)
    return wide[:, 3 : 3 + c].copy_(x)


def _misaligned(x: Tensor) -> Tensor:
    """channels_last, from one element behind the start of its storage."""
    _, c, h, w = x.shape
    storage = x.new_full((x.numel() + 2,), torch.nan)
    return storage.as_strided(x.shape, (h * w * c, 1, w * c, c), 1).copy_(x)


def _padded_rows(x: Tensor) -> Tensor:
    """channels_last, with a gap of NaN behind each row and each image."""
    n, c, h, w = x.shape
    wide = x.new_full((n, c, h + 1, w + 2), torch.nan).to(memory_format=torch.channels_last)
    return wide[:, :, :h, :w].copy_(x)


def _every_other(x: Tensor) -> Tensor:
    """Every other column of every other image."""
    n, c, h, w = x.shape
    return x.new_full((2 * n, c, h, 2 * w), torch.nan)[::2, :, :, ::2].copy_(x)


# Each gives the same values at other addresses.
ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": _channel_slice,
    "misaligned": _misaligned,
    "padded_rows": _padded_rows,
    "every_other": _every_other,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}

# Each repeats a part of the values without memory of its own.
EXPANSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one_image": lambda x: x[:1].expand_as(x),
    "one_channel": lambda x: x[:, :1].expand_as(x),
    "one_column": lambda x: x[..., :1].expand_as(x),
    "one_value": lambda x: x[:1, :1, :1, :1].expand_as(x),  # the gradient of .sum()
}

ALL_ARRANGEMENTS = ARRANGEMENTS | EXPANSIONS
