"""Weights as oneDNN wants them, for the convolutions of a frozen network on the CPU."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from inception_ext._frozen import Convolution

__all__ = ["LEAST_TILES", "Size", "Weights", "takes_winograd", "winograd_weight"]

Size = tuple[int, int]  # height and width

_CHUNK = 48  # tiles; one packing serves all chunks that frozen_convolution.cpp makes
_VECTOR = 16  # channels; oneDNN is slow with groups of others

# Tiles of an image. With fewer, the products wait for their weights, of which there are four times
# as many as in a plain convolution, and eight times as many bytes as in one of bfloat16, which is
# twice as fast besides.
LEAST_TILES = {torch.float32: 10, torch.bfloat16: 32}


class Weights:
    """Packed weights of convolutions, each layout held once; for one thread at a time."""

    def __init__(self) -> None:
        self._plain: dict[Convolution, list[Tensor]] = {}
        self._winograd: dict[Convolution, Tensor] = {}

    def plain(self, conv: Convolution, images: int, size: Size) -> Tensor:
        """In the layout that oneDNN prefers for images of this size."""
        shape = (images, conv.weight.shape[1], *size)
        packed = _packed(conv.weight, conv.padding, conv.stride, 1, shape)
        held = self._plain.setdefault(conv, [])
        for other in held:
            if _same_layout(packed, other):
                return other
        held.append(packed)
        return packed

    def winograd(self, conv: Convolution) -> Tensor:
        if conv not in self._winograd:
            weight = winograd_weight(conv.weight.float())
            shape = (1, 36 * weight.shape[1], _CHUNK, 1)
            self._winograd[conv] = _packed(weight, [0, 0], [1, 1], 36, shape)
        return self._winograd[conv]


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two packings of one weight hold it in one order.

    Also where torch does not tell: any layout is right, and one of each size would be too many.
    """
    ops = torch.ops.mkldnn
    if not (hasattr(ops, "_nbytes") and hasattr(ops, "data_ptr")):
        return True

    def memory(packed: Tensor) -> Tensor:
        buffer = (ctypes.c_uint8 * ops._nbytes(packed)).from_address(ops.data_ptr(packed))
        return torch.frombuffer(buffer, dtype=torch.uint8)

    return torch.equal(memory(a), memory(b))


def _packed(
    weight: Tensor, padding: list[int], stride: list[int], groups: int, input_size: Sequence[int]
) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, [1, 1], groups, list(input_size)
    )


def _tiles(size: Size) -> int:
    """Tiles of 4x4 pixels that cover an image."""
    return -(-size[0] // 4) * -(-size[1] // 4)


def _has_bfloat16_tiles() -> bool:
    """Whether bfloat16 is multiplied so fast (AMX) that a quarter of it in float32 is no gain."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def takes_winograd(conv: Convolution, size: Size) -> bool:
    """Whether a convolution of images of this size goes by Winograd's F(4x4, 3x3).

    Below 32 channels the products are too small to be efficient.
    """
    k, c, *kernel = conv.weight.shape
    return (
        (conv.weight.dtype == torch.float32 or not _has_bfloat16_tiles())
        and kernel == [3, 3]
        and conv.stride == [1, 1]
        and conv.padding == [1, 1]
        and c % _VECTOR == k % _VECTOR == 0
        and min(c, k) >= 32
        and _tiles(size) >= LEAST_TILES[conv.weight.dtype]
    )


def winograd_weight(weight: Tensor) -> Tensor:
    """``G w G^T`` of each filter, for F(4x4, 3x3) with points 0, +-sqrt(1/2), +-sqrt(2), infinity.

    Args:
        weight: ``[K, C, 3, 3]``.

    Returns:
        ``[36 * K, C, 1, 1]`` of the same dtype, position by position: see ``csrc/cpu/winograd.h``.
    """
    a, b = 0.5**0.5, 2**0.5
    g = torch.tensor(  # [6, 3]
        [
            [1, 0, 0],
            *([[-2 / 3, sign * a * -2 / 3, -1 / 3] for sign in (1, -1)]),
            *([[1 / 6, sign * b / 6, 1 / 3] for sign in (1, -1)]),
            [0, 0, 1],
        ],
        dtype=torch.float64,
        device=weight.device,
    )
    k, c, *_ = weight.shape
    products = torch.kron(g, g) @ weight.double().reshape(k * c, 9).T  # [36, K * C]
    return products.to(weight.dtype).reshape(36 * k, c, 1, 1)
