"""The emulated kernels that pack convolution weights."""

import pytest
import torch
import training_kernels as kernels
from emulator_build import COMPILER, HEADERS
from torch import Tensor
from training_kernels import DTYPE_CODE, INVALID_VALUE, Tensors, emulator

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]

LAYOUTS = {
    "nchw": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda w: torch.nn.functional.pad(w, (1, 2, 0, 1, 3, 0), value=torch.nan)[
        :, 3:, : w.shape[2], 1 : 1 + w.shape[3]
    ],
}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]

each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=str)


def ceil8(size: int) -> int:
    return -(-size // 8) * 8


def weight(k: int, c: int, r: int, s: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(k, c, r, s, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fprop(w: Tensor) -> Tensor:
    """[K, R * S * C] in (r, s, c) order."""
    return w.permute(0, 2, 3, 1).flatten(1)


def dgrad(w: Tensor) -> Tensor:
    """[C, R * S * K] in (r, s, k) order, the filter turned by 180 degrees."""
    return w.flip(2, 3).permute(1, 2, 3, 0).flatten(1)


def pack(order: str, parts: list[tuple[Tensor, Tensor]], code: int = kernels.SUCCESS) -> None:
    """Of weights and the views of packed matrices that they fill, all in one launch."""
    tensors = Tensors()
    filters = [
        tensors.fields("READ", weight=w)
        | tensors.fields("WRITE", packed=packed)
        | {
            "stride": list(w.stride()),
            "packed_stride": packed.stride(0),
            "filters": w.shape[0],
            "channels": w.shape[1],
            "kernel_h": w.shape[2],
            "kernel_w": w.shape[3],
            "packed_columns": packed.shape[1],
        }
        for w, packed in parts
    ]
    w, packed = parts[0]
    params = {"dtype": DTYPE_CODE[packed.dtype], "weight_dtype": DTYPE_CODE[w.dtype]}
    launcher = getattr(kernels.load_module(), f"pack_{order}")
    assert launcher(filters, params, tensors.declared) == code


@each_dtype
@each_layout
@pytest.mark.parametrize("order", ["fprop", "dgrad"])
def test_six_filters_in_one_launch(order, layout, dtypes):
    sizes = [
        (48, 24, 3, 3),
        (7, 5, 5, 5),
        (64, 100, 1, 1),
        (3, 33, 2, 3),
        (1, 1, 1, 1),
        (40, 3, 7, 7),
    ]
    parts, expected = [], []
    for i, size in enumerate(sizes):
        w = LAYOUTS[layout](weight(*size, dtypes[0], i))
        matrix = (fprop if order == "fprop" else dgrad)(w).to(dtypes[1])
        rows, columns = matrix.shape
        parts.append((w, torch.full((rows, ceil8(columns)), torch.nan, dtype=dtypes[1])))
        expected.append(torch.nn.functional.pad(matrix, (0, ceil8(columns) - columns)))
    with emulator(seed=1) as launches:
        pack(order, parts)
    for (_, packed), matrix in zip(parts, expected, strict=True):
        assert torch.equal(packed, matrix)
    (launch,) = launches
    assert launch["bank_conflicts"] == 0
    read = sum(w.numel() for w, _ in parts) * dtypes[0].itemsize
    written = sum(packed.numel() for _, packed in parts) * dtypes[1].itemsize
    assert launch["bytes_read"] == read and launch["bytes_written"] == written


def test_filters_that_share_a_matrix():
    """The 1x1 convolutions of a module: below one another forward, side by side backward."""
    sizes = (20, 13, 8)
    weights = [weight(k, 37, 1, 1, torch.float32, k) for k in sizes]
    joined = torch.cat(weights).half()
    forward = torch.full((41, 40), torch.nan, dtype=torch.float16)
    backward = torch.full((37, 48), torch.nan, dtype=torch.float16)
    with emulator(seed=2):
        pack("fprop", list(zip(weights, forward.split(sizes), strict=True)))
        # The last one fills the row with zeros.
        pack("dgrad", list(zip(weights, backward.split((20, 13, 15), 1), strict=True)))
    assert torch.equal(forward, torch.nn.functional.pad(fprop(joined), (0, 3)))
    assert torch.equal(backward, torch.nn.functional.pad(dgrad(joined), (0, 7)))


def test_the_packed_filters_give_the_gradient():
    """A convolution with them is torch's gradient of the input."""
    w = weight(6, 4, 3, 3, torch.float32)
    packed = torch.full((4, ceil8(54)), torch.nan)
    with emulator():
        pack("dgrad", [(w, packed)])
    dy = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1))
    filters = packed[:, :54].reshape(4, 3, 3, 6).permute(0, 3, 1, 2)
    expected = torch.nn.grad.conv2d_input((2, 4, 5, 7), w, dy, padding=1)
    torch.testing.assert_close(torch.nn.functional.conv2d(dy, filters, padding=1), expected)


def test_rounding_and_special_values():
    w = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 7e4, torch.nan, -torch.inf, 1e-9, -0.0, 3.0])
    packed = torch.zeros(1, 8, dtype=torch.float16)
    with emulator():
        pack("fprop", [(w.reshape(1, 8, 1, 1), packed)])
    torch.testing.assert_close(packed[0], w.half(), rtol=0, atol=0, equal_nan=True)


def test_bad_params():
    w = weight(4, 8, 1, 1, torch.float32)
    pack("fprop", [(w, torch.zeros(4, 7))], INVALID_VALUE)  # too narrow
    pack("fprop", [(w.half(), torch.zeros(4, 8))], INVALID_VALUE)  # float16 to float32
    pack("dgrad", [(w, torch.zeros(8, 3))], INVALID_VALUE)
    with emulator() as launches:
        pack("fprop", [(w[:0], torch.zeros(0, 8))])
    assert launches == []
