"""A frozen network on the CPU: chains of its steps, each as one op (``csrc/torch/frozen.cpp``).

The op computes what the steps of :mod:`inception_ext._frozen` do: convolutions by oneDNN, max pools
and the rest by our kernels. 3x3 convolutions go by Winograd's F(4x4, 3x3), whose matrix
products are oneDNN's as well, in float32: a quarter of the multiplications.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inception_ext import _frozen, _gate
from inception_ext._frozen import Convolution, Frozen, Inception, Pool, Step, run_in_slices
from inception_ext._plan import CONVOLUTION, INCEPTION, POOL, pool_sizes
from inception_ext._windows import output_size, pair

__all__ = ["LEAST_TILES", "FrozenCpu", "winograd_weight"]


class FrozenCpu(Frozen):
    """:class:`Frozen`, where runs of known steps are one op each."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stem_chains, self._body_chains = _chained(self.stem), _chained(self.body)

    def run_part(self, steps: list[Step], x: Tensor, images: int) -> Tensor:
        for chain in self._stem_chains if steps is self.stem else self._body_chains:
            x = chain(x, images)
        return x


class _Chain:
    """Steps that follow one another; as one op where ``fused``."""

    def __init__(self, steps: list[Step], fused: bool) -> None:
        self.steps, self.fused = steps, fused
        self._plan: _Plan | None = None

    def __call__(self, x: Tensor, images: int) -> Tensor:
        if not self.fused or not _takes_op(x):
            return run_in_slices(self.steps, x, images)
        plan = self._plan
        if plan is None or not plan.serves(x):
            self._plan = plan = _Plan(self.steps, x, images, plan)
        return torch.ops.inception_ext.frozen_forward(
            x, plan.weights, plan.biases, plan.numbers, images
        )


def _takes_op(x: Tensor) -> bool:
    """Whether x is a plain tensor, outside of anything that traces or transforms the call."""
    return (
        not torch.compiler.is_compiling()
        and _gate.why_unavailable() is None
        and _gate.why_transformed() is None
        and type(x) is Tensor
        and x.numel() > 0
        and _frozen.has_fused_convolution(x)
    )


def _chained(steps: Sequence[Step]) -> list[_Chain]:
    """Splits steps into runs that one op takes, and those that it does not."""
    chains: list[_Chain] = []
    for step in steps:
        fused = _is_known(step)
        if chains and chains[-1].fused == fused:
            chains[-1].steps.append(step)
        else:
            chains.append(_Chain([step], fused))
    return chains


def _is_known(step: Step) -> bool:
    if isinstance(step, Inception):
        return _is_known(step.pool)
    if isinstance(step, Pool):
        return _window(step.module) is not None
    return isinstance(step, Convolution)


def _window(pool: Any) -> list[int] | None:
    """Kernel, stride, padding of a max pool, each as height and width; None: not for the op."""
    kernel, stride, padding, dilation = (
        pair(v) or [0, 0] for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    if pool.return_indices or dilation != [1, 1] or kernel[0] * kernel[1] > 255:
        return None
    if min(*kernel, *stride) < 1:
        return None
    if any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        return None
    return [*kernel, *stride, *padding]


class _Plan:
    """The arguments of the op for some steps, weights packed for a slice of x.

    Winograd's weights are packed only where images of x's size go that way; a plan for larger
    images takes the place of ``before`` where these come.
    """

    def __init__(
        self, steps: Sequence[Step], x: Tensor, images: int, before: "_Plan | None" = None
    ) -> None:
        self.numbers: list[int] = []
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self._images = min(images, max(1, x.shape[0] // torch.get_num_threads()))
        h, w = (0, 0) if before is None else before._largest
        self._largest: tuple[int, int] = (max(h, x.shape[2]), max(w, x.shape[3]))
        size = self._largest
        with torch.no_grad():
            for step in steps:
                size = self._add(step, size)

    def serves(self, x: Tensor) -> bool:
        """Whether there is every weight that images of x's size read."""
        return x.shape[2] <= self._largest[0] and x.shape[3] <= self._largest[1]

    def _add(self, step: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Appends a step that reads ``size`` pixels; returns the size of its output."""
        if isinstance(step, Convolution):
            return self._add_convolution(step, size)
        if isinstance(step, Pool):
            window = _window(step.module)
            assert window is not None
            self.numbers += [POOL, *window, int(step.module.ceil_mode)]
            return pool_sizes(size, window, step.module.ceil_mode)
        self.numbers += [INCEPTION, *step.split]
        for part in (step.merged, step.conv_3x3, step.conv_5x5, step.pool):
            self._add(part, size)
        return self._add(step.projection, size)

    def _add_convolution(self, conv: Convolution, size: tuple[int, int]) -> tuple[int, int]:
        least_tiles = LEAST_TILES[conv.weight.dtype]
        fast = _takes_winograd(conv) and _tiles(size) >= least_tiles
        self.numbers += [CONVOLUTION, *conv.stride, *conv.padding, least_tiles if fast else 0]
        _, c, *kernel = conv.weight.shape
        self.weights.append(
            _packed(conv.weight, conv.padding, conv.stride, 1, (self._images, c, *size))
        )
        if fast:
            weight = winograd_weight(conv.weight.float())
            self.weights.append(_packed(weight, [0, 0], [1, 1], 36, (1, 36 * c, _CHUNK, 1)))
        self.biases.append(conv.bias)
        h, w = (output_size(size[i], kernel[i], conv.stride[i], conv.padding[i]) for i in (0, 1))
        return h, w


def _packed(
    weight: Tensor, padding: list[int], stride: list[int], groups: int, input_size: Sequence[int]
) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, [1, 1], groups, list(input_size)
    )


_CHUNK = 48  # tiles; one packing serves all chunks that frozen_convolution.cpp makes
_VECTOR = 16  # channels; oneDNN is slow with groups of others

# Tiles of an image. With fewer, the products wait for their weights, of which there are four times
# as many as in a plain convolution, and eight times as many bytes as in one of bfloat16, which is
# twice as fast besides.
LEAST_TILES = {torch.float32: 4, torch.bfloat16: 32}


def _tiles(size: tuple[int, int]) -> int:
    """Tiles of 4x4 pixels that cover an image."""
    return -(-size[0] // 4) * -(-size[1] // 4)


def _has_bfloat16_tiles() -> bool:
    """Whether bfloat16 is multiplied so fast (AMX) that a quarter of it in float32 is no gain."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _takes_winograd(conv: Convolution) -> bool:
    """Below 32 channels the products are too small to be efficient."""
    k, c, *kernel = conv.weight.shape
    return (
        (conv.weight.dtype == torch.float32 or not _has_bfloat16_tiles())
        and kernel == [3, 3]
        and conv.stride == [1, 1]
        and conv.padding == [1, 1]
        and c % _VECTOR == k % _VECTOR == 0
        and min(c, k) >= 32
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
