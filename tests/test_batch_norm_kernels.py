"""The emulated batch norm kernels, launcher by launcher, with several items in a launch."""

import math

import pytest
import torch
import torch.nn.functional as F
import training_kernels as kernels
from closeness import assert_as_good_as_eager
from emulator_build import COMPILER, HEADERS
from torch import Tensor
from training_kernels import DTYPE_CODE, INVALID_VALUE, Tensors, emulator, require_success

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]

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


@each_dtype
@each_arrangement
@pytest.mark.parametrize("shape", [(1000, 64), (77, 24), (333, 208), (5, 17), (70, 136)])
def test_tile_statistics(dtype, arrangement, shape):
    norm = Norm(*shape, dtype, 0, arrangement)
    with emulator(seed=1) as launches:
        mean, m2 = tile_statistics(norm.x)
    rows = rows_of(norm.x, mean)
    exact = norm.x.double().split(rows)
    for ours, reference in [
        (mean + norm.x[::rows].float(), torch.stack([part.mean(0) for part in exact])),
        (m2, torch.stack([part.var(0, correction=0) * len(part) for part in exact])),
    ]:
        assert (ours - reference).abs().max() <= 4e-6 * reference.abs().max()
    (launch,) = launches
    assert launch["bank_conflicts"] == 0
    size = norm.x.numel() * dtype.itemsize
    assert launch["touched"][0] == {"operand": "x", "read": size, "written": 0}
    # Each thread reads the tile's first pixel besides its own, out of the cache.
    blocks = launch["grid"][0] * launch["grid"][1]
    assert launch["bytes_read"] <= size + blocks * (256 * 16 + 64 * dtype.itemsize)


@each_arrangement
@pytest.mark.parametrize(
    ("dtype", "mean"), [(torch.float32, 1e4), (torch.float16, 1e3), (torch.bfloat16, 1e2)], ids=str
)
def test_statistics_of_a_large_mean(dtype, mean, arrangement):
    """Of a deviation of some units in the last place."""
    deviation = 10 * mean * torch.finfo(dtype).eps
    values = torch.randn(4000, 40, generator=generator(1), dtype=torch.float64)
    x = arranged((mean + deviation * values).to(dtype), arrangement)
    with emulator():
        tile_mean, m2 = tile_statistics(x)
        item = {"tile_mean": tile_mean, "tile_m2": m2, "x": x, "pixels": 4000}
        (result,) = finalize([item | {"rows": rows_of(x, tile_mean)}])
    exact = x.double()
    # Half a unit in its last place, and four roundings of what is relative to the first pixel.
    half_unit = 2.0 ** (math.floor(math.log2(mean)) - 24)
    spread = (exact - exact[0]).abs().max()
    assert (result["mean"] - exact.mean(0)).abs().max() <= half_unit + 4 * 2.0**-24 * spread
    variance = exact.var(0, correction=0)
    assert ((result["m2"] / 4000 - variance) / variance).abs().max() < 1e-6


@pytest.mark.parametrize("tiles", [1, 3, 130, 830])
@pytest.mark.parametrize("seed", [0, 5])
def test_finalize(tiles, seed):
    """Six items at once, of several sizes; the last tile is shorter."""
    items, inputs, before = [], [], []
    for i, channels in enumerate([64, 3, 8, 40, 16, 33]):
        pixels = tiles * 12 - 7 * (i % 2)
        x = 3 * torch.randn(pixels, channels, generator=generator(i)) + 2 * i
        mean, m2 = tiles_of(x, 12)
        running = {
            "running_mean": torch.randn(channels, generator=generator(10)),
            "running_var": torch.rand(channels, generator=generator(11)) + 0.5,
        }
        if i == 3:
            running = {}
        wide = torch.full((len(mean), 2 * channels + 5), torch.nan)  # rows with a stride
        wide[:, :channels], wide[:, channels : 2 * channels] = mean, m2
        items.append(
            {
                "tile_mean": wide[:, :channels],
                "tile_m2": wide[:, channels : 2 * channels],
                "pixels": pixels,
                "rows": 12,
                **running,
            }
        )
        inputs.append(x.double())
        before.append({name: tensor.clone() for name, tensor in running.items()})
    with emulator(seed) as launches:
        results = finalize(items, momentum=0.3)
    assert len(launches) == 1 and launches[0]["bank_conflicts"] == 0
    for item, x, old, result in zip(items, inputs, before, results, strict=True):
        variance = x.var(0, correction=0)
        close = {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(result["mean"].double(), x.mean(0), **close)
        torch.testing.assert_close(result["m2"].double(), variance * len(x), **close)
        torch.testing.assert_close(result["rstd"].double(), (variance + EPS).rsqrt(), **close)
        if old:
            expected = 0.7 * old["running_mean"].double() + 0.3 * x.mean(0)
            torch.testing.assert_close(item["running_mean"].double(), expected, **close)
            expected = 0.7 * old["running_var"].double() + 0.3 * x.var(0)
            torch.testing.assert_close(item["running_var"].double(), expected, **close)


def test_finalize_of_a_large_mean():
    """Merging 833 tiles of a mean of 1e4 and a deviation of 1e-2."""
    x = 1e4 + 1e-2 * torch.randn(833 * 16, 24, generator=generator(2), dtype=torch.float64)
    x = x.float().double()
    mean, m2 = tiles_of(x, 16)
    with emulator():
        (result,) = finalize([{"tile_mean": mean, "tile_m2": m2, "pixels": len(x), "rows": 16}])
    assert (result["mean"] - x.mean(0)).abs().max() <= 5.1e-4
    # What the tiles' means have lost, half a unit in the last place each, is in m2 as well.
    variance = x.var(0, correction=0)
    assert ((result["m2"] / len(x) - variance) / variance).abs().max() < 5e-3


def test_finalize_of_tiles_with_their_own_counts():
    """What several processes have: as if it were one batch."""
    counts = torch.tensor([7, 1, 0, 300, 22], dtype=torch.int32)
    x = torch.randn(int(counts.sum()), 12, generator=generator(3), dtype=torch.float64)
    mean, m2 = torch.zeros(2, 5, 12)
    for i, part in enumerate(x.split(counts.tolist())):
        if len(part):
            mean[i], m2[i] = part.mean(0), part.var(0, correction=0) * len(part)
    with emulator():
        (result,) = finalize([{"tile_mean": mean, "tile_m2": m2, "tile_pixels": counts}])
    torch.testing.assert_close(result["mean"].double(), x.mean(0), rtol=1e-6, atol=1e-6)
    rstd = (x.var(0, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(result["rstd"].double(), rstd, rtol=1e-6, atol=1e-6)


def test_finalize_of_one_pixel_and_of_none():
    """One pixel: the statistics of evaluation mode out of running ones. None: nothing changes."""
    running = {"running_mean": torch.ones(9), "running_var": torch.ones(9)}
    item = {"tile_mean": torch.rand(1, 9), "tile_m2": torch.rand(1, 9), "pixels": 1, "rows": 1}
    nothing = {"tile_mean": torch.empty(0, 9), "tile_m2": torch.empty(0, 9), "pixels": 0, "rows": 1}
    one = {name: tensor.clone() for name, tensor in running.items()}
    with emulator():
        results = finalize([item, nothing | running, item | one | {"tile_m2": torch.zeros(1, 9)}])
    assert torch.equal(results[0]["mean"], item["tile_mean"][0])
    torch.testing.assert_close(results[0]["rstd"], (item["tile_m2"][0] + EPS).rsqrt())
    assert not results[1]["mean"].any() and torch.allclose(
        results[1]["rstd"], torch.tensor(EPS).rsqrt()
    )
    assert (running["running_mean"] == 1).all() and (running["running_var"] == 1).all()
    assert one["running_var"].isnan().all() and one["running_mean"].isfinite().all()


def test_finalize_passes_nan_on():
    mean, m2 = tiles_of(torch.randn(400, 10, generator=generator(4)), 4)
    m2[70, 3] = torch.nan
    mean[0, 5] = torch.nan
    with emulator():
        (result,) = finalize([{"tile_mean": mean, "tile_m2": m2, "pixels": 400, "rows": 4}])
    assert result["rstd"].isnan().nonzero().flatten().tolist() == [3, 5]


@each_dtype
@each_arrangement
@pytest.mark.parametrize("pixels", [1, 601])
def test_apply(dtype, arrangement, pixels):
    """Four items in a launch; bytes as predicted, and what lies between stays as it was."""
    sizes = (64, 128, 32, 208) if arrangement != "misaligned" else (64, 7, 130, 1)
    norms = [Norm(pixels, c, dtype, i, arrangement) for i, c in enumerate(sizes)]
    for norm in norms:
        norm.set_statistics()
    with emulator(seed=2) as launches:
        results = apply(norms)
    for norm, y in zip(norms, results, strict=True):
        assert_right(norm, {"y": y}, training=False)
        if y._base is not None and arrangement != "dense":
            assert y._base.isnan().sum() == y._base.numel() - y.numel()
    (launch,) = launches
    size = pixels * sum(sizes) * dtype.itemsize
    assert launch["bank_conflicts"] == 0
    assert launch["bytes_written"] == size
    assert launch["bytes_touched"] == 2 * size + 4 * 4 * sum(sizes)


@each_dtype
@each_arrangement
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pixels", [2, 700])
def test_backward(dtype, arrangement, training, pixels):
    sizes = INCEPTION_3A if arrangement != "misaligned" else (40, 7, 130, 1)
    norms = [Norm(pixels, c, dtype, 10 + i, arrangement) for i, c in enumerate(sizes)]
    for norm in norms:
        keep_clear_of_zero(norm)
    with emulator(seed=3) as launches:
        results = backward(norms, training)
    for norm, result in zip(norms, results, strict=True):
        assert_right(norm, result, training)
    reduce, last = launches
    size, chunks = pixels * sum(sizes) * dtype.itemsize, reduce["grid"][1]
    partials = 8 * chunks * sum(sizes)
    assert reduce["bank_conflicts"] == last["bank_conflicts"] == 0
    assert reduce["bytes_touched"] == 2 * size + 16 * sum(sizes) + partials
    assert last["bytes_touched"] == 3 * size + 24 * sum(sizes) + partials
    # What the blocks read again of the partial sums is a small part.
    assert last["bytes_read"] <= 2 * size + 64 * sum(sizes) * last["grid"][1] + (
        partials * last["grid"][1]
    )


def test_backward_of_what_is_wanted_only():
    norm = Norm(300, 48, torch.float16, 7)
    keep_clear_of_zero(norm)
    for training in (True, False):
        for wanted in ("dx", "dgamma", "dbeta", "dgamma dbeta", "dx dbeta"):
            with emulator() as launches:
                (result,) = backward([norm], training, wanted)
            assert_right(norm, result, training)
            needs_sums = training or wanted != "dx"
            assert len(launches) == 1 + needs_sums
            if wanted != "dx" and "dx" not in wanted:
                assert launches[-1]["grid"] == (1, 1, 1)


def test_in_place():
    """dx over dy, y over x."""
    norm = Norm(700, 72, torch.float16, 8)
    keep_clear_of_zero(norm)
    with emulator():
        (apart,) = backward([norm])
        (y,) = apply([norm])
    module, x, dy = kernels.load_module(), norm.x.clone(), norm.dy.clone()
    fields = {"x_stride": 72, "y_stride": 72, "dy_stride": 72, "dx_stride": 72, "channels": 72}
    with emulator():
        tensors = Tensors()
        item = vectors(tensors, norm) | tensors.fields("UPDATE", x=x) | fields
        params = {"pixels": 700, "dtype": DTYPE_CODE[torch.float16]}
        require_success(module.apply([item | {"y": item["x"]}], params, tensors.declared))
        assert torch.equal(x, y)
        tensors = Tensors()
        chunks = module.chunks(700, 72)
        partials = torch.full((chunks, 2, 72), torch.nan)
        params |= {"chunks": chunks, "count": 700, "batch_statistics": True}
        item = vectors(tensors, norm) | fields | tensors.fields("READ", x=norm.x, dy=dy)
        item |= tensors.fields("WRITE", partials=partials)
        require_success(module.backward_reduce([item], params, tensors.declared))
        tensors = Tensors()
        item = vectors(tensors, norm) | fields | tensors.fields("READ", x=norm.x)
        item |= tensors.fields("READ", partials=partials) | tensors.fields("UPDATE", dy=dy)
        item["dx"] = item["dy"]
        require_success(module.backward_apply([item], params, tensors.declared))
    assert torch.equal(dy, apart["dx"])


@each_dtype
def test_nan_and_infinity(dtype):
    norm = Norm(90, 24, dtype, 9)
    norm.set_statistics()
    norm.x[3, 2], norm.x[5, 4], norm.x[6, 7] = torch.nan, torch.inf, -torch.inf
    with emulator():
        (y,), (result,) = apply([norm]), backward([norm], batch_statistics=False)
    assert y.isnan().nonzero().tolist() == [[3, 2]]
    assert y[5, 4] == torch.inf and y[6, 7] == 0
    assert result["dx"][3, 2] != 0 and result["dx"][6, 7] == 0 and result["dx"].isfinite().all()
    assert result["dgamma"].isfinite().logical_not().nonzero().flatten().tolist() == [2, 4, 7]


@each_dtype
def test_same_bits_for_every_seed(dtype):
    norms = [Norm(500, c, dtype, i) for i, c in enumerate(INCEPTION_3A)]
    for norm in norms:
        norm.set_statistics()
    runs = []
    for seed in range(4):
        with emulator(seed):
            statistics = [tile_statistics(norm.x) for norm in norms]
            merged = finalize(
                [
                    {
                        "tile_mean": mean,
                        "tile_m2": m2,
                        "x": norm.x,
                        "pixels": 500,
                        "rows": rows_of(norm.x, mean),
                    }
                    for norm, (mean, m2) in zip(norms, statistics, strict=True)
                ]
            )
            ys, gradients = apply(norms), backward(norms)
        flat = [t for parts in statistics for t in parts] + ys
        flat += [t for result in (*merged, *gradients) for t in result.values()]
        runs.append(flat)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_nothing_to_do():
    norm = Norm(0, 16, torch.float32, 0)
    norm.mean, norm.rstd = torch.zeros(16), torch.ones(16)
    with emulator() as launches:
        (y,), (result,) = apply([norm]), backward([norm])
    assert y.shape == (0, 16) and not result["dgamma"].any() and not result["dbeta"].any()
    assert len(launches) == 1  # which writes these zeros


def test_bad_params():
    norm = Norm(4, 8, torch.float32, 0)
    norm.set_statistics()
    mean, m2 = tiles_of(norm.x, 2)
    finalize([{"tile_mean": mean, "tile_m2": m2, "pixels": 5, "rows": 2}], code=INVALID_VALUE)
    module, tensors = kernels.load_module(), Tensors()
    item = {"x_stride": 8, "y_stride": 8, "channels": 8} | vectors(tensors, norm)
    params = {"pixels": 4, "dtype": 2}
    assert module.apply([item], params, tensors.declared) == INVALID_VALUE  # no x
    item |= tensors.fields("READ", x=norm.x) | tensors.fields("WRITE", y=norm.x)
    assert module.apply([item], params | {"dtype": 7}, []) == INVALID_VALUE
    assert module.apply([item], params | {"pixels": -1}, []) == INVALID_VALUE
