"""The layers without weights in training, each way by itself: whether right, and how fast."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gpu_kernels
import roofs
import scenario
import torch
from timing import relative_error
from torch import Tensor

from inception_ext import _gate, _library, functional, reference

__all__ = ["checks", "kernels"]


@dataclass(frozen=True)
class Layer:
    """``call``: by functional or reference, of x; ``backward``: the op, of gradient and x."""

    name: str
    shape: tuple[int, int, int]  # C, H, W of x
    reads_x: bool  # in the backward
    call: Callable[[Any, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _lrn(channels: int, side: int) -> Layer:
    window = (5, 1e-4, 0.75, 1.0)
    return Layer(
        "lrn",
        (channels, side, side),
        True,
        lambda library, x: library.lrn(x, *window),
        lambda grad, x: _library.ops(x).lrn_backward(grad, x, *window),
    )


def _aux_pool(channels: int, side: int, kernel: int, stride: int) -> Layer:
    return Layer(
        "aux_pool" + (f" {kernel}x{kernel}/{stride}" if kernel else ""),
        (channels, side, side),
        False,
        lambda library, x: library.aux_pool(x, 4, kernel, stride),
        lambda grad, x: _library.ops(x).aux_pool_backward(grad, [*x.shape[2:]], kernel, stride),
    )


def layers(job: Any) -> list[Layer]:
    """Those of both networks at 224 x 224; one of each, and small, where there is no GPU."""
    if job.device.type == "cpu":
        return [_lrn(16, 7), _aux_pool(16, 7, 0, 1)]
    pools = [_aux_pool(c, 14, *window) for c in (512, 528) for window in ((0, 1), (5, 3))]
    return [_lrn(64, 56), _lrn(192, 56), *pools]


def checks(job: Any) -> Iterator[dict[str, Any]]:
    """A ``check`` a layer and dtype: the errors of y and of the gradient, whichever is larger."""
    batch = 4 if job.device.type == "cuda" else 2
    for dtype in ("fp16", "bf16", "fp32") if job.device.type == "cuda" else ("fp32",):
        for layer in layers(job):
            case = {"variant": f"{layer.name} {layer.shape[0]}", "dtype": dtype, "batch": batch}
            case |= {"size": list(layer.shape[1:]), "images": "forward and backward"}
            scenario.say(f"correctness: {dtype} {layer.name} {layer.shape}")
            try:
                case |= _check(job, layer, dtype, batch)
            except Exception as error:  # the next layer may do better
                case |= {"ok": False, "raised": f"{type(error).__name__}: {error}"[:500]}
            yield {"check": case}
    scenario.say("")


def _check(job: Any, layer: Layer, dtype: str, batch: int) -> dict[str, Any]:
    x, grad = _tensors(job, layer, scenario.DTYPES[dtype], batch)

    def results(library: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer.call(library, leaf)
        return [y.detach(), *torch.autograd.grad(y, leaf, grad)]

    truth = results(reference, x.double(), grad.double())
    ours, again = (results(functional, x, grad) for _ in range(2))
    repeats = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    error, eager = (relative_error(r, truth) for r in (ours, results(reference, x, grad)))
    limit = 2 * eager + scenario.NOISE[dtype]
    found = {"error": error, "eager": eager, "limit": limit, "repeats": repeats}
    return found | {"launches": 0, "closest": None, "wrong": [], "ok": repeats and error <= limit}


def kernels(job: Any) -> Iterator[dict[str, Any]]:
    """Each layer each way at each batch size, as :func:`gpu_kernels.kernels` has its launches."""
    dtype = scenario.DTYPES[job.dtype]
    roof = roofs.measure(job.device, dtype)
    for batch in job.batches:
        for layer in layers(job):
            x, grad = _tensors(job, layer, dtype, batch)
            for name, call, size in _ways(layer, x, grad):
                scenario.say(f"kernels {job.dtype} batch {batch}: {name}")
                floor = size / roof.bytes
                found = {"batch": batch, "dtype": job.dtype, "name": name, "flops": 0}
                found |= {"bytes": size, "floor_us": floor * 1e6}
                try:
                    found |= gpu_kernels.times(job.device, call)
                    found["share_of_floor"] = round(floor / found["warm_us"]["median"] * 1e6, 4)
                except Exception as error:  # the next one may do better
                    found["error"] = f"{type(error).__name__}: {error}"[:300]
                yield {"kernel": found}
    scenario.say("")


def _ways(layer: Layer, x: Tensor, grad: Tensor) -> Iterator[tuple[str, Callable[[], None], int]]:
    """Name, call and bytes that it has to move: each tensor once."""
    name = f"{layer.name} {'x'.join(map(str, layer.shape))}"
    of_x, of_y = x.numel() * x.element_size(), grad.numel() * grad.element_size()

    def forward() -> None:
        with torch.no_grad():
            layer.call(functional, x)

    yield f"{name}, forward", forward, of_x + of_y
    leaf = x.detach().requires_grad_()
    y = layer.call(functional, leaf)
    has_kernel = _gate.why_no_kernel(x) is None and not _gate.runs_on_cpu(x)

    def backward() -> None:
        if has_kernel:
            layer.backward(grad, x)
        else:
            torch.autograd.grad(y, leaf, grad, retain_graph=True)

    yield f"{name}, backward", backward, of_x * (2 if layer.reads_x else 1) + of_y


def _tensors(job: Any, layer: Layer, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    """x and a gradient of what the layer makes of it, channels_last."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator).to(job.device.type, dtype)
        return values.contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        x = random(batch, *layer.shape)
        return x, random(*layer.call(functional, x).shape)
