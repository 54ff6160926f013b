"""The emulated max pool kernels (tests/cpp/max_pool_host.cpp) through ctypes."""

import ctypes
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int32, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch
from emulator_build import build_library
from max_pool_cases import Pool

SOURCE = Path(__file__).parent / "cpp" / "max_pool_host.cpp"

SUCCESS, INVALID_VALUE, BAD_ACCESS = 0, 1, -1
DTYPE_CODE = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class PixelStrides(ctypes.Structure):
    _fields_ = [("n", c_int64), ("h", c_int64), ("w", c_int64)]


SIZES = ("batch", "channels", "input_h", "input_w", "output_h", "output_w")
WINDOW = ("kernel_h", "kernel_w", "stride_h", "stride_w", "padding_h", "padding_w")


class ForwardParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "y", "argmax")),
        *((name, PixelStrides) for name in ("x_stride", "y_stride")),
        *((name, c_int64) for name in SIZES),
        *((name, c_int32) for name in (*WINDOW, "dtype")),
    ]


class BackwardParams(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad_y", "argmax", "grad_x")),
        *((name, PixelStrides) for name in ("grad_y_stride", "grad_x_stride")),
        *((name, c_int64) for name in SIZES),
        *((name, c_int32) for name in (*WINDOW, "dtype")),
        ("accumulate", c_bool),
    ]


class Region(ctypes.Structure):
    _fields_ = [("begin", c_void_p), ("end", c_void_p)]


def load_library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build_library("max_pool_host", SOURCE)))
    for function, params in ((lib.forward, ForwardParams), (lib.backward, BackwardParams)):
        function.argtypes = [POINTER(params), POINTER(Region), c_int, c_uint32]
    for function in (lib.launches, lib.grid_x, lib.forward_params_size, lib.backward_params_size):
        function.restype = c_int64
    lib.last_error.restype = c_char_p
    assert lib.forward_params_size() == ctypes.sizeof(ForwardParams)
    assert lib.backward_params_size() == ctypes.sizeof(BackwardParams)
    return lib


def regions_of(*tensors: torch.Tensor | None):
    regions = []
    for t in tensors:
        if t is None or t.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        regions.append(Region(t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return (Region * max(len(regions), 1))(*regions), len(regions)


def strides_of(t: torch.Tensor) -> PixelStrides:
    assert t.stride(3) == 1 or t.shape[3] <= 1
    return PixelStrides(*t.stride()[:3])


def common_params(x: torch.Tensor, y: torch.Tensor, pool: Pool) -> dict[str, int]:
    n, h, w, c = x.shape
    sizes = dict(zip(SIZES, (n, c, h, w, y.shape[1], y.shape[2]), strict=True))
    values = (*pool.kernel, *pool.stride, *pool.padding)
    return {**sizes, **dict(zip(WINDOW, values, strict=True)), "dtype": DTYPE_CODE[x.dtype]}


def forward_params(x, y, argmax, pool: Pool) -> ForwardParams:
    return ForwardParams(
        x=x.data_ptr(),
        y=y.data_ptr(),
        argmax=argmax.data_ptr() if argmax is not None else None,
        x_stride=strides_of(x),
        y_stride=strides_of(y),
        **common_params(x, y, pool),
    )


def backward_params(grad_y, argmax, grad_x, pool: Pool) -> BackwardParams:
    return BackwardParams(
        grad_y=grad_y.data_ptr(),
        argmax=argmax.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_y_stride=strides_of(grad_y),
        grad_x_stride=strides_of(grad_x),
        **common_params(grad_x, grad_y, pool),
    )


def change(params: ctypes.Structure, **fields) -> None:
    for name, value in fields.items():
        setattr(params, name, value)


def run_forward(lib, x, y, argmax, pool: Pool, seed: int = 0) -> None:
    params = forward_params(x, y, argmax, pool)
    status = lib.forward(byref(params), *regions_of(x, y, argmax), seed)
    assert status == SUCCESS, lib.last_error()


def run_backward(lib, grad_y, argmax, grad_x, pool: Pool, accumulate=False, seed: int = 0) -> None:
    params = backward_params(grad_y, argmax, grad_x, pool)
    params.accumulate = accumulate
    status = lib.backward(byref(params), *regions_of(grad_y, argmax, grad_x), seed)
    assert status == SUCCESS, lib.last_error()
