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


def strides(x: Tensor) -> list[int]:
    """Those that lead to elements, which are what compiled code relies on."""
    return [step for size, step in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


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


# The batch norms' vectors and an Inception module's parameters, and calls of every op.


def bn_tensors(channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "weight": randn(channels, seed=10).mul(0.5).add(1).to(dtype),
        "bias": randn(channels, seed=11).mul(0.3).to(dtype),
        "running_mean": randn(channels, seed=12).abs().add(0.5).to(dtype),
        "running_var": randn(channels, seed=13).abs().add(0.5).to(dtype),
    }


CHANNELS = {"odd": (17, (5, 3, 7, 1, 4, 6)), "even": (24, (16, 8, 24, 8, 16, 8))}


def inception_tensors(
    channels: str = "odd",
    branch3: int = 3,
    dtype: torch.dtype = torch.float32,
    vectors: torch.dtype = torch.float32,
) -> dict[str, list[Tensor]]:
    """Of a module whose every convolution keeps the deviation; weights in dtype."""
    c, k = CHANNELS[channels]
    fan_in = [c, c, 9 * k[1], c, branch3**2 * k[3], c]
    shapes = [(c, 1), (c, 1), (k[1], 3), (c, 1), (k[3], branch3), (c, 1)]
    bns = [bn_tensors(size, vectors) for size in k]
    return {
        "conv_weights": [
            randn(k[i], shapes[i][0], shapes[i][1], shapes[i][1], seed=20 + i)
            .div(fan_in[i] ** 0.5)
            .to(dtype)
            for i in range(6)
        ],
        **{
            plural: [bn[name].clone() for bn in bns]
            for plural, name in (
                ("weights", "weight"),
                ("biases", "bias"),
                ("running_means", "running_mean"),
                ("running_vars", "running_var"),
            )
        },
    }


def output_of(channels: str) -> int:
    k = CHANNELS[channels][1]
    return k[0] + k[2] + k[4] + k[5]


CALLS = (
    "max_pool_forward",
    "max_pool_forward, no argmax",
    "max_pool_backward",
    "batch_norm_relu_forward, train",
    "batch_norm_relu_forward, eval",
    "batch_norm_relu_backward",
    "inception_forward, train",
    "inception_forward, eval",
    "inception_backward",
    "inception_backward, no dx",
    "image_to_nhwc",
    "copy_channels",
    "conv3x3_forward",
    "conv3x3_backward",
    "conv3x3_backward, no dx",
)


def op_calls(dtype: torch.dtype = torch.float32, size: tuple[int, int, int] = (2, 6, 5)) -> dict:
    """Arguments for each op, from images of [N, H, W]: those of CALLS."""
    ops = torch.ops.inception_ext
    n, h, w = size
    x = randn(n, 17, h, w, dtype=dtype)
    bn = list(bn_tensors(17).values())
    lists = list(inception_tensors(branch3=5, dtype=dtype).values())
    grad = randn(n, output_of("odd"), h, w, seed=1, dtype=dtype)
    pool = ([3, 3], [2, 2], [1, 1])
    alone = ("", 1)  # the group
    y, argmax = ops.max_pool_forward(x, *pool, True, True)
    _, mean, rstd = ops.batch_norm_relu_forward(x, *bn, False, 0.1, 1e-3)
    saved = ops.inception_forward(x, *lists, False, 0.1, 1e-3, True)[1:]
    wide = torch.zeros(n, 20, h, w, dtype=dtype).to(memory_format=torch.channels_last)
    x32, weight = randn(n, 32, h, w), randn(33, 32, 3, 3)
    arguments = (
        (x, *pool, True, True),
        (x, *pool, False, False),
        (randn(*y.shape, dtype=dtype), argmax, [h, w], *pool),
        (x, *bn, True, 0.1, 1e-3, *alone),
        (x, *bn, False, 0.1, 1e-3, *alone),
        (x, x, *bn[:2], mean, rstd, True, True, *alone),
        (x, *lists, True, 0.1, 1e-3, True, True, *alone),
        (x, *lists, False, 0.1, 1e-3, False, True, *alone),
        (grad, x, *lists[:3], *saved, True, [True] * 7, True, True, *alone),
        (grad, x, *lists[:3], *saved, True, [False] * 5 + [True] * 2, True, False, *alone),
        (x, [2.0] * 17, [1.0] * 17, torch.bfloat16),
        (wide, x, 2),
        (x32, weight),
        (randn(n, 33, h, w), x32, weight, [True, True]),
        (randn(n, 33, h, w), x32, weight, [False, True]),
    )
    return dict(zip(CALLS, arguments, strict=True))


def op_of(name: str) -> Any:
    return getattr(torch.ops.inception_ext, name.partition(",")[0]).default
