"""Whether the engine and each of its launches are right, on the GPU at hand, in all shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import launches
import scenario
import torch
import workload
from timing import relative_error
from torch import Tensor, nn

import inception_ext
from inception_ext.functional import use_kernels

__all__ = ["findings"]

Size = tuple[int, int]


def findings(job: Any) -> Iterator[dict[str, Any]]:
    """One dict a case, see :func:`_case`, or ``raised``; those that say most come first."""
    networks = {
        "torchvision": inception_ext.googlenet,
        "5x5": lambda **kw: inception_ext.googlenet(branch3_kernel_size=5, **kw),
        "bvlc": inception_ext.bvlc_googlenet,
    }
    for variant, dtype, batch, size, kind in _cases(job):
        torch.manual_seed(0)
        model = networks[variant](aux_logits=False, init_weights=False)
        if variant == "torchvision":
            model.load_state_dict(job.state_dict(False))
        else:
            _enliven(model)
        model = model.to(job.device.type).eval()
        case = {"variant": variant, "dtype": dtype, "batch": batch, "size": list(size)}
        case["images"] = kind
        scenario.say(f"correctness: {variant} {dtype} {batch} x {list(size)} {kind}")
        try:
            case |= _case(job, model, dtype, batch, size, kind)
        except Exception as error:  # the next case may do better
            case |= {"ok": False, "raised": f"{type(error).__name__}: {error}"[:500]}
        yield {"check": case}
    scenario.say("")


def _cases(job: Any) -> Iterator[tuple[str, str, int, Size, str]]:
    if job.device.type == "cpu":
        yield "torchvision", "fp32", 1, (job.size, job.size), "uint8 NHWC"
        yield "bvlc", "fp32", 2, (33, 47), "float NCHW"
        return
    whole = (224, 224)
    for dtype in ("fp16", "bf16", "tf32", "fp32"):
        yield "torchvision", dtype, 8, whole, "float NHWC"
        yield "torchvision", dtype, 3, (33, 47), "uint8 NHWC"
    for batch in (1, 128, 32, 256, 0):
        yield "torchvision", "fp16", batch, whole, "float NCHW"
    yield "torchvision", "fp16", 2, (15, 15), "uint8 NCHW"
    yield "torchvision", "fp16", 1, (512, 331), "float NHWC"
    for variant in ("bvlc", "5x5"):
        for dtype in ("fp16", "fp32"):
            yield variant, dtype, 4, whole, "float NCHW"
            yield variant, dtype, 1, (63, 64), "uint8 NHWC"


def _case(
    job: Any, model: nn.Module, dtype: str, batch: int, size: Size, kind: str
) -> dict[str, Any]:
    """Errors of logits and of every launch; ``ok`` tells whether all are within their limits.

    Returns:
        ``error``, ``eager``, ``limit`` of the logits in the 2-norm; ``repeats``: whether later
        calls gave the same bits; ``launches``: how many were checked against their plain twins;
        ``closest``: of all those the largest share of its limit that an error took; ``wrong``:
        the names of those beyond it.
    """
    compute = scenario.DTYPES["fp32" if dtype == "tf32" else dtype]
    images, as_floats = _images(job, batch, size, kind)
    with torch.no_grad(), workload.untuned(), _tf32(dtype == "tf32"):
        engine = inception_ext.freeze(model, dtype=compute)
        with launches.Catch(checking=True) as caught:
            ours = engine(images)
        repeats = all(torch.equal(ours, engine(images)) for _ in range(3))
        with use_kernels(False):
            eager = model.to(compute)(as_floats.to(compute))
            truth = model.double()(as_floats.double())
    found: dict[str, Any] = {"repeats": repeats, "launches": len(caught.checks)}
    found["closest"] = max((c.error / c.limit for c in caught.checks), default=None)
    found["wrong"] = [c._asdict() for c in caught.checks if not c.ok]
    if batch == 0:
        found["ok"] = tuple(ours.shape) == tuple(truth.shape)
        return found
    error, theirs = (relative_error(y, truth) for y in (ours, eager))
    limit = 2 * theirs + scenario.NOISE[dtype]
    found |= {"error": error, "eager": theirs, "limit": limit}
    found["ok"] = repeats and not found["wrong"] and error <= limit
    return found


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Whether torch, and we with it, may round the factors of float32 products."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _images(job: Any, batch: int, size: Size, kind: str) -> tuple[Tensor, Tensor]:
    """Images as the engine gets them, and as the network would."""
    from inception_ext.engine import IMAGENET_MEAN, IMAGENET_STD

    (x,) = workload.images(max(batch, 1), 1, seed=7, size=max(size))
    x = x[:batch, :, : size[0], : size[1]].to(job.device.type)
    element, layout = kind.split()
    if element == "uint8":
        pixels = (x * 50 + 120).clamp(0, 255).to(torch.uint8)
        mean, std = (
            torch.tensor(v, device=x.device, dtype=torch.float64).view(3, 1, 1)
            for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        images, x = pixels, (pixels.double() / 255 - mean) / std
    else:
        images = x
    given = images.permute(0, 2, 3, 1) if layout == "NHWC" else images
    return given.contiguous(), x


def _enliven(model: nn.Module) -> None:
    """Weights that let a signal through every layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.uniform_(module.bias, 0.2, 0.5)
