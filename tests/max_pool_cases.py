"""What the max pool tests share: the oracle, the layouts and the special values.

Activations here are NHWC tensors with channel stride 1, as the kernels see them.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# sliced: channels of a wider tensor; misaligned: the same from an odd channel on. padded_rows and
# odd_rows: a gap of 16 or 3 elements after each row. misaligned and odd_rows do not suit vectors.
LAYOUTS = ["dense", "sliced", "misaligned", "padded_rows", "odd_rows"]
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclass(frozen=True)
class Pool:
    """The arguments of max_pool2d, (h, w) each."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil_mode: bool

    @classmethod
    def square(cls, kernel: int, stride: int, padding: int, ceil_mode: bool) -> "Pool":
        return cls((kernel, kernel), (stride, stride), (padding, padding), ceil_mode)

    def __str__(self) -> str:
        text = "-".join(
            f"{name}{a}" if a == b else f"{name}{a}x{b}"
            for name, (a, b) in zip("ksp", (self.kernel, self.stride, self.padding), strict=True)
        )
        return text + ("-ceil" if self.ceil_mode else "")


SQUARE_POOLS = [
    Pool.square(*arguments)
    for arguments in itertools.product((2, 3), (1, 2), (0, 1), (False, True))
]


def reference_forward(x: torch.Tensor, pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x [N, H, W, C]: torch's y, and argmax as kh * kernel_w + kw (uint8)."""
    y, flat = F.max_pool2d(
        x.permute(0, 3, 1, 2).float().contiguous(),  # exact, and so are the comparisons
        pool.kernel,
        pool.stride,
        pool.padding,
        ceil_mode=pool.ceil_mode,
        return_indices=True,
    )
    oh = torch.arange(y.shape[2]).view(-1, 1) * pool.stride[0] - pool.padding[0]
    ow = torch.arange(y.shape[3]) * pool.stride[1] - pool.padding[1]
    kh, kw = flat // x.shape[2] - oh, flat % x.shape[2] - ow
    argmax = (kh * pool.kernel[1] + kw).to(torch.uint8)
    y = y.to(x.dtype)
    return y.permute(0, 2, 3, 1).contiguous(), argmax.permute(0, 2, 3, 1).contiguous()


def reference_backward(x: torch.Tensor, grad_y: torch.Tensor, pool: Pool) -> torch.Tensor:
    """Autograd's gradient of x [N, H, W, C], in float64."""
    leaf = x.permute(0, 3, 1, 2).double().contiguous().requires_grad_()
    y = F.max_pool2d(leaf, pool.kernel, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
    y.backward(grad_y.permute(0, 3, 1, 2).double())
    assert leaf.grad is not None
    return leaf.grad.permute(0, 2, 3, 1)


def gradient_bound(
    x: torch.Tensor, grad_y: torch.Tensor, old: torch.Tensor | None, pool: Pool
) -> torch.Tensor:
    """Largest error of a float32 sum of up to 9 gradients and `old`, rounded once to the dtype."""
    magnitude = reference_backward(x, grad_y.abs(), pool)
    if old is not None:
        magnitude = magnitude + old.double().abs()
    summation = 9 * 2.0**-24 * magnitude
    smallest = torch.finfo(grad_y.dtype).smallest_normal * UNIT_ROUNDOFF[grad_y.dtype]
    return UNIT_ROUNDOFF[grad_y.dtype] * (magnitude + summation) + summation + smallest


def in_buffer(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A view [N, H, W, C] and the larger buffer around it, which is NaN (0xEE for uint8)."""
    n, h, w, c = shape
    pixel = c + 24 if layout in ("sliced", "misaligned") else c
    row = w * pixel + {"padded_rows": 16, "odd_rows": 3}.get(layout, 0)
    offset = 64 + {"sliced": 8, "misaligned": 3}.get(layout, 0)
    canary = torch.nan if dtype.is_floating_point else 0xEE
    buffer = torch.full((64 + n * h * row + 64,), canary, dtype=dtype, device=device)
    assert buffer.data_ptr() % 64 == 0
    return buffer.as_strided(shape, (h * row, row, pixel, 1), offset), buffer


def random_input(shape: tuple[int, ...], dtype: torch.dtype, seed: int, values: str = "ties"):
    """x [N, H, W, C]. `ties`: few values, half of them zero as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if values == "normal":
        return x.to(dtype)
    x = x.round().relu()
    if values == "signed_zero":
        x = torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0.0)
    if values in ("nan", "inf", "nan_inf"):
        chance = torch.rand(shape, generator=generator)
        if "nan" in values:
            x[chance < 0.15] = torch.nan
        if "inf" in values:
            x[chance > 0.5] = -torch.inf
            x[chance > 0.97] = torch.inf
    if values == "all_minus_inf":
        x.fill_(-torch.inf)
    return x.to(dtype)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, the sign of zero too, except that any NaN equals any NaN."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = [t.contiguous().view(integer).masked_fill(nan, 0) for t in (actual, expected)]
    torch.testing.assert_close(*bits, rtol=0, atol=0)
