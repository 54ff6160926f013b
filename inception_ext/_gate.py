"""The one gate that decides between kernel and reference.

The kernels are used only where they give what the reference would give. Each function here names
the first reason against them, or None where there is none.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from inception_ext import _library
from inception_ext._process_group import ALONE, Group
from inception_ext._tracing import constant_while_tracing, is_exporting
from inception_ext._windows import output_size, pair

__all__ = [
    "PLAIN_TYPES",
    "needs_grad",
    "runs_on_cpu",
    "use_kernels",
    "why_aux_pool_reference",
    "why_conv3x3_reference",
    "why_hooked",
    "why_inference_reference",
    "why_lrn_reference",
    "why_module_reference",
    "why_no_chain_kernel",
    "why_no_kernel",
    "why_pool_reference",
    "why_reference",
    "why_transformed",
    "why_unavailable",
]

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN_TYPES = {Tensor, nn.Parameter}

_enabled = os.environ.get("INCEPTION_EXT_DISABLE", "0") != "1"


@contextmanager
def use_kernels(enabled: bool) -> Iterator[None]:
    """Turns the kernels off (or on again) within a block, for the whole process."""
    global _enabled
    before = _enabled
    _enabled = enabled
    try:
        yield
    finally:
        _enabled = before


def why_unavailable() -> str | None:
    """Why no kernel runs in this process, or None."""
    if not _library.is_available():
        return f"the compiled kernels are missing ({_library.load_error()})"
    if not _enabled:
        return "turned off (INCEPTION_EXT_DISABLE=1 or use_kernels(False))"
    return None


def why_reference(x: Tensor) -> str | None:
    """Why an activation goes the reference way, or None where the kernels take it.

    Args:
        x: ``[N, C, H, W]``, or anything else that a module may be called with.
    """
    if not _library.is_available() or not _enabled:
        return why_unavailable()
    if type(x) not in PLAIN_TYPES:
        return f"input is a {type(x).__name__}, not a plain Tensor"
    if _has_any_global_hook():
        return "a hook on all modules"
    if is_exporting():
        return "torch.export"
    if (reason := why_transformed()) is not None:
        return reason
    if x.dim() != 4:
        return f"input is {x.dim()}-D, not 4-D"
    if _library.device_type(x) != "cpu":
        return f"no kernel for device {_library.device_type(x)}"
    if x.dtype not in _CPU_DTYPES:
        return f"no kernel for dtype {x.dtype} on cpu"
    if x.layout != torch.strided:
        return f"no kernel for layout {x.layout}"
    return None


def why_transformed() -> str | None:
    """Why what runs is not only to compute, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if _in_functorch():
        return "a functorch transform (vmap, grad, jvp, ...) is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def why_inference_reference(x: Tensor, dtype: torch.dtype) -> str | None:
    """As :func:`why_reference`, for inference with folded weights.

    Args:
        x: any tensor on the device that is to compute.
        dtype: of the computation.
    """
    if (reason := why_unavailable() or why_transformed()) is not None:
        return reason
    if _library.device_type(x) != "cuda":
        return f"no kernel for device {_library.device_type(x)}"
    if dtype not in _CUDA_DTYPES:
        return f"no kernel for dtype {dtype} on cuda"
    return _why_not_on(x.device) if x.is_cuda else None


def why_no_kernel(x: Tensor) -> str | None:
    """As :func:`why_reference`, for the ops that have kernels for the CPU and for CUDA."""
    reason = why_reference(x)
    if reason != "no kernel for device cuda":
        return reason
    if x.dtype not in _CUDA_DTYPES:
        return f"no kernel for dtype {x.dtype} on cuda"
    if x.layout != torch.strided:
        return f"no kernel for layout {x.layout}"
    return _why_not_on(x.device) if x.is_cuda else None


def runs_on_cpu(x: Tensor) -> bool:
    """Whether the kernels that serve x are those of the CPU."""
    return _library.device_type(x) == "cpu"


@constant_while_tracing  # torch.compile guards the stack itself
def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def why_module_reference(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a kernel may not stand in for calling ``module``, or None.

    A replaced, parametrized or subclassed module has another type than ``kind``; hooks would not
    run.
    """
    if type(module) is not kind:
        return f"{type(module).__name__} in place of {kind.__name__}"
    return why_hooked(module)


def why_hooked(module: nn.Module) -> str | None:
    """Why calling ``module`` does more than its class's ``forward``, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return f"a hook on a {type(module).__name__}"
    return None


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def why_conv3x3_reference(x: Tensor, weight: Tensor) -> str | None:
    """As :func:`why_reference`, for :func:`inception_ext.functional.conv3x3`."""
    if (reason := why_reference(x)) is not None:
        return reason
    if type(weight) not in PLAIN_TYPES or weight.device != x.device:
        return "a weight that is no plain tensor of the same device"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return "no kernel for these dtypes"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if tuple(weight.shape[1:]) != (x.shape[1], 3, 3) or min(weight.shape[:2]) < 32:
        return "a convolution that is not 3x3 over 32 channels or more"
    if 0 in x.shape[2:]:
        return "an empty image"
    return None


def why_pool_reference(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int]
) -> str | None:
    """As :func:`why_reference`, for :func:`inception_ext.functional.max_pool`."""
    kernel, step = pair(kernel_size), pair(stride)
    if kernel is None or step is None:
        return "a window that is not two integers"
    if (reason := why_no_kernel(x)) is not None:
        return reason
    on_cuda = _library.device_type(x) == "cuda"
    if on_cuda and not (set(kernel) <= {2, 3} and set(step) <= {1, 2}):
        return "no CUDA kernel for this window"
    if min(kernel) < 1 or kernel[0] * kernel[1] > 255:
        return "window of more than 255 elements"
    if x.shape[2] < kernel[0] or x.shape[3] < kernel[1]:
        return "input smaller than the window"  # the reference words the error, if it is one
    return None


def why_aux_pool_reference(
    x: Tensor, output_size: int, kernel_size: int, stride: int
) -> str | None:
    """As :func:`why_reference`, for :func:`inception_ext.functional.aux_pool`."""
    if (reason := why_no_kernel(x)) is not None:
        return reason
    if runs_on_cpu(x):
        return "no kernel for an average pool on cpu"
    if 0 in x.shape[1:]:
        return "an empty image"
    if not all(isinstance(size, int) for size in (output_size, kernel_size, stride)):
        return "a window that is not of integers"
    if output_size < 1 or kernel_size < 0 or stride < 1:
        return "a window that is not positive"
    if kernel_size and (output_size - 1) * stride + kernel_size > min(x.shape[2:]):
        return "input smaller than the windows"
    return None


def why_lrn_reference(x: Tensor, size: int, alpha: float, beta: float, k: float) -> str | None:
    """As :func:`why_reference`, for :func:`inception_ext.functional.lrn`."""
    if (reason := why_no_kernel(x)) is not None:
        return reason
    if runs_on_cpu(x):
        return "no kernel for local response normalisation on cpu"
    if not isinstance(size, int) or size < 1:  # the reference words the error
        return "a window that is not a positive integer"
    if not all(isinstance(number, int | float) for number in (alpha, beta, k)):
        return "a factor that is not a number"
    return "an empty image" if 0 in x.shape[1:] else None


@constant_while_tracing  # a device stays what it is
def _why_not_on(device: torch.device) -> str | None:
    return _library.why_not_on(torch.cuda.get_device_capability(device))


def why_no_chain_kernel(
    x: Tensor,
    conv_weights: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    pool: Sequence[int],
    training: bool,
    group: Group = ALONE,
) -> str | None:
    """As :func:`why_reference`, for these sizes of :func:`inception_ext.functional.conv_chain`."""
    if (reason := why_no_kernel(x)) is not None:
        return reason
    if runs_on_cpu(x):
        return "no kernel for a chain of convolutions on cpu"
    if not 1 <= len(conv_weights) <= 2:
        return f"a chain of {len(conv_weights)} convolutions"
    if strides[0] != 1 and needs_grad(x):
        return "a convolution with stride whose input needs a gradient"
    if pool and not (pool[0] in (2, 3) and pool[1] in (1, 2) and 2 * pool[2] <= pool[0]):
        return "no CUDA kernel for this pool"
    size = [x.shape[2], x.shape[3]]
    if 0 in x.shape[1:]:
        return "an empty image"
    for i, weight in enumerate(conv_weights):
        if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
            return "a filter that is not square"
        kernel, stride, padding = weight.shape[2], strides[i], paddings[i]
        if not (0 <= padding < kernel <= 127 and 1 <= stride <= 127):
            return "no kernel for this convolution"
        if i > 0 and stride != 1:
            return "a second convolution with stride"
        size = [output_size(s, kernel, stride, padding) for s in size]
        pixels = x.shape[0] * size[0] * size[1]
        if min(size) < 1 or (training and pixels == 1 and group.size == 1):
            return "an output too small"  # the reference words the error
    if pool and min(size) < pool[0]:
        return "an output too small to pool"
    return None
