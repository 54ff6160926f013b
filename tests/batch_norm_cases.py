"""Batch norms for the kernels' tests: items of a launch, and what is right for each."""

import pytest
import torch
import torch.nn.functional as F
import training_kernels as kernels
from closeness import assert_as_good_as_eager
from torch import Tensor
from training_kernels import DTYPE_CODE, Tensors, require_success

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-3
INCEPTION_3A = (64, 128, 32, 32)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_arrangement = pytest.mark.parametrize("arrangement", ["dense", "sliced", "misaligned"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arranged(x: Tensor, arrangement: str) -> Tensor:
    """``x`` [P, C] with NaN around it."""
    first, margin = {"dense": (0, 0), "sliced": (8, 24), "misaligned": (3, 24)}[arrangement]
    buffer = torch.full((len(x), x.shape[1] + margin), torch.nan, dtype=x.dtype)
    view = buffer[:, first : first + x.shape[1]]
    return view.copy_(x)


class Norm:
    """One batch norm + ReLU: its input, its parameters, and what is known of it."""

    def __init__(
        self, pixels: int, channels: int, dtype: torch.dtype, seed: int, arrangement: str = "dense"
    ) -> None:
        random = generator(seed)
        mean = torch.randn(channels, generator=random)
        values = torch.randn(pixels, channels, generator=random) + mean
        self.x = arranged(values.to(dtype), arrangement)
        self.dy = arranged(torch.randn(pixels, channels, generator=random).to(dtype), arrangement)
        self.gamma = torch.rand(channels, generator=random) + 0.5
        self.beta = torch.randn(channels, generator=random)
        self.arrangement = arrangement
        self.argmax: Tensor | None = None

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    def set_statistics(self) -> None:
        """mean and rstd as they should be."""
        x = self.x.double()
        self.mean = x.mean(0).float()
        self.rstd = (x.var(0, correction=0) + EPS).rsqrt().float()

    def empty_like_x(self) -> Tensor:
        return arranged(torch.full_like(self.x, torch.nan), self.arrangement)


def vectors(tensors: Tensors, norm: Norm) -> dict[str, int]:
    return tensors.fields("READ", mean=norm.mean, rstd=norm.rstd, gamma=norm.gamma, beta=norm.beta)


def tile_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tiles, mean less the first pixel, and M2."""
    tiles = kernels.load_module().chunks(*x.shape)
    mean, m2 = torch.full((2, tiles, x.shape[1]), torch.nan)
    tensors = Tensors()
    fields = tensors.fields("READ", x=x) | tensors.fields("WRITE", tile_mean=mean, tile_m2=m2)
    fields |= {
        "x_stride": x.stride(0),
        "pixels": len(x),
        "channels": x.shape[1],
        "tiles": tiles,
        "dtype": DTYPE_CODE[x.dtype],
    }
    require_success(kernels.load_module().tile_statistics(fields, tensors.declared))
    return mean, m2


def rows_of(x: Tensor, mean: Tensor) -> int:
    """Pixels of each tile but the last."""
    return -(-len(x) // len(mean))


def tiles_of(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and M2 of each run of rows, from float64."""
    parts = x.double().split(rows)
    means = torch.stack([part.mean(0) for part in parts])
    m2 = torch.stack([part.var(0, correction=0) * len(part) for part in parts])
    return means.float(), m2.float()


def finalize(
    items: list[dict], momentum: float = 0.1, code: int = kernels.SUCCESS
) -> list[dict[str, Tensor]]:
    """Of items with ``tile_mean``, ``tile_m2``, ``pixels``, ``rows``, or ``tile_pixels``.

    ``x`` [P, C]: what tile_mean is relative to.
    """
    tensors, fields, results = Tensors(), [], []
    for item in items:
        channels = item["tile_mean"].shape[1]
        mean, m2, rstd = torch.full((3, channels), torch.nan)
        running = {k: v for k, v in item.items() if k.startswith("running")}
        fields.append(
            tensors.fields("READ", tile_mean=item["tile_mean"], tile_m2=item["tile_m2"])
            | tensors.fields("READ", tile_pixels=item.get("tile_pixels"), x=item.get("x"))
            | tensors.fields("WRITE", mean=mean, m2=m2, rstd=rstd)
            | tensors.fields("UPDATE", **running)
            | {
                "tile_stride": item["tile_mean"].stride(0),
                "x_stride": item["x"].stride(0) if "x" in item else 0,
                "dtype": DTYPE_CODE[item["x"].dtype] if "x" in item else 0,
                "tile_pixels_stride": 1 if (n := item.get("tile_pixels")) is None else n.stride(0),
                "pixels": item.get("pixels", 0),
                "rows_per_tile": item.get("rows", 0),
                "tiles": len(item["tile_mean"]),
                "channels": channels,
                "momentum": momentum,
                "eps": EPS,
            }
        )
        results.append({"mean": mean, "m2": m2, "rstd": rstd})
    assert kernels.load_module().finalize(fields, tensors.declared) == code
    return results


def apply(norms: list[Norm]) -> list[Tensor]:
    tensors, fields, results = Tensors(), [], []
    for norm in norms:
        y = norm.empty_like_x()
        fields.append(
            tensors.fields("READ", x=norm.x)
            | tensors.fields("WRITE", y=y)
            | vectors(tensors, norm)
            | {"x_stride": norm.x.stride(0), "y_stride": y.stride(0), "channels": norm.channels}
        )
        results.append(y)
    x = norms[0].x
    params = {"pixels": len(x), "dtype": DTYPE_CODE[x.dtype]}
    require_success(kernels.load_module().apply(fields, params, tensors.declared))
    return results


def backward(
    norms: list[Norm],
    batch_statistics: bool = True,
    wanted: str = "dx dgamma dbeta",
    pool: dict[str, int] | None = None,
) -> list[dict[str, Tensor]]:
    """Reduce, if somebody needs it, and apply; with a pool, dy is that of its output."""
    module = kernels.load_module()
    x = norms[0].x
    needs_sums = batch_statistics or "d" in wanted.replace("dx", "")
    chunks = module.chunks(len(x), sum(norm.channels for norm in norms)) if needs_sums else 0
    params = {
        "chunks": chunks,
        "pixels": len(x),
        "count": len(x),
        "batch_statistics": batch_statistics,
        "dtype": DTYPE_CODE[x.dtype],
        **(pool or {}),
    }
    partials = [torch.full((chunks, 2, norm.channels), torch.nan) for norm in norms]
    results = []
    for norm in norms:
        outputs = {
            "dx": norm.empty_like_x(),
            "dgamma": torch.full_like(norm.gamma, torch.nan),
            "dbeta": torch.full_like(norm.beta, torch.nan),
        }
        results.append({name: outputs[name] for name in wanted.split()})

    def fields(tensors: Tensors, use: str) -> list[dict[str, int]]:
        return [
            tensors.fields("READ", x=norm.x, dy=norm.dy, argmax=norm.argmax)
            | vectors(tensors, norm)
            | tensors.fields(use, partials=partial if needs_sums else None)
            | (tensors.fields("WRITE", **result) if use == "READ" else {})
            | {
                "x_stride": norm.x.stride(0),
                "dy_stride": norm.dy.stride(0),
                "dx_stride": result["dx"].stride(0) if "dx" in result else 0,
                "channels": norm.channels,
            }
            for norm, partial, result in zip(norms, partials, results, strict=True)
        ]

    if needs_sums:
        tensors = Tensors()
        items = fields(tensors, "WRITE")
        require_success(module.backward_reduce(items, params, tensors.declared))
    tensors = Tensors()
    items = fields(tensors, "READ")
    require_success(module.backward_apply(items, params, tensors.declared))
    return results


def eager(norm: Norm, training: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and gradients of plain PyTorch, with the ReLU's decisions taken in float64."""
    dtype = dtype or norm.x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = norm.x.to(dtype, copy=True).requires_grad_()
    gamma = norm.gamma.to(wide, copy=True).requires_grad_()
    beta = norm.beta.to(wide, copy=True).requires_grad_()
    mean, var = norm.mean.to(wide), norm.rstd.double().pow(-2).to(wide) - EPS
    y = F.batch_norm(x, mean, var, gamma, beta, training, 0.0, EPS)
    exact = (norm.x.double() - norm.mean.double()) * (norm.gamma * norm.rstd) + norm.beta
    torch.where(exact > 0, y, torch.zeros_like(y)).backward(norm.dy.to(dtype))
    assert x.grad is not None and gamma.grad is not None and beta.grad is not None
    return {"y": y.relu().detach(), "dx": x.grad, "dgamma": gamma.grad, "dbeta": beta.grad}


def assert_right(norm: Norm, results: dict[str, Tensor], training: bool = True) -> None:
    expected = eager(norm, training), eager(norm, training, torch.float64)
    for name, result in results.items():
        assert_as_good_as_eager(result, expected[0][name], expected[1][name], name=name)


def keep_clear_of_zero(norm: Norm) -> None:
    """Moves values whose ReLU rounding might decide; statistics stay as they are set after."""
    for _ in range(3):
        norm.set_statistics()
        y = (norm.x.float() - norm.mean) * (norm.gamma * norm.rstd) + norm.beta
        near = y.abs() < 0.02
        if not near.any():
            return
        norm.x.copy_(torch.where(near, norm.x.float() + 0.2 / norm.gamma, norm.x.float()))
    norm.set_statistics()
