"""The emulated batch norm kernels, launcher by launcher, with several items in a launch."""

import math

import pytest
import torch
import training_kernels as kernels
from batch_norm_cases import (
    EPS,
    INCEPTION_3A,
    Norm,
    apply,
    arranged,
    assert_right,
    backward,
    each_arrangement,
    each_dtype,
    finalize,
    generator,
    keep_clear_of_zero,
    rows_of,
    tile_statistics,
    tiles_of,
    vectors,
)
from emulator_build import COMPILER, HEADERS
from training_kernels import DTYPE_CODE, INVALID_VALUE, Tensors, emulator, require_success

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]


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
