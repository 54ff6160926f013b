"""The floor model against counts made by hand; benchmarks/floors.py counts a model's layers."""

import importlib
from pathlib import Path

import pytest
import torch

import inception_ext
from inception_ext._torchvision import import_torchvision

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def floors():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("floors")


@pytest.fixture(scope="module")
def layers(floors):
    return floors.trace(floors.network())


def of(layers, part):
    return [layer for layer in layers if layer.part == part]


def test_the_work_of_an_image(floors, layers):
    assert sum(layer.flops for layer in layers) == 2_996_752_384
    assert sum(p.numel() for p in floors.network().parameters()) == 6_624_904
    bvlc = floors.network("bvlc")
    assert sum(layer.flops for layer in floors.trace(bvlc)) / 1e9 == pytest.approx(3.165, abs=5e-4)
    assert sum(p.numel() for p in bvlc.parameters()) / 1e6 == pytest.approx(7.00, abs=5e-3)


def test_torchvisions_model_has_the_same_layers(floors, layers):
    import_torchvision()
    from torchvision.models import googlenet

    with torch.device("meta"):
        model = googlenet(weights=None, aux_logits=False, init_weights=False)
    assert floors.trace(model) == layers


@pytest.mark.parametrize(
    ("schedule", "megabytes"),
    [("eager", 66.6), ("fused", 24.5), ("merged", 20.7), ("modules on chip", 13.6)],
)
def test_bytes_of_an_image(floors, layers, schedule, megabytes):
    assert round(floors.total(floors.stages(layers, schedule)).bytes / 1e6, 1) == megabytes


def test_fused_stem_and_pools(floors, layers):
    chain = floors.stages(layers, "all fused")
    assert round(floors.total(chain).bytes / 1e6, 1) == 5.0
    stem = sum(stage.bytes for stage in chain[:2])
    # images 3 x 224 x 224, pool1 64 x 56 x 56 written and read, pool2 192 x 28 x 28
    assert stem == 2 * (3 * 224 * 224 + 2 * 64 * 56 * 56 + 192 * 28 * 28)


# 3a at 28 x 28: 192 -> 64 | 96, 128 | 16, 32 | 32; KB by hand for every module.
@pytest.mark.parametrize(
    ("part", "layerwise", "on_chip"),
    [
        ("inception3a", 1957, 702),
        ("inception3b", 2860, 1154),
        ("inception4a", 1041, 389),
        ("inception4b", 1110, 401),
        ("inception4c", 1123, 401),
        ("inception4d", 1148, 408),
        ("inception4e", 1305, 533),
        ("inception5a", 445, 163),
        ("inception5b", 474, 182),
    ],
)
def test_bytes_of_a_module(floors, layers, part, layerwise, on_chip):
    module = of(layers, part)
    assert floors.total(floors.stages(module, "merged")).bytes / 1e3 == pytest.approx(
        layerwise, abs=0.5
    )
    assert floors.total(floors.stages(module, "modules on chip")).bytes / 1e3 == pytest.approx(
        on_chip, abs=0.5
    )


def test_a_module_in_two_launches(floors, layers):
    first, second = floors.stages(of(layers, "inception3a"), "engine")
    pixels = 28 * 28 * 2
    assert first.bytes == pixels * (192 + 64 + 96 + 16 + 32)
    assert second.bytes == pixels * (96 + 128 + 16 + 32)
    assert first.flops == 2 * 28 * 28 * 192 * (64 + 96 + 16 + 32)
    assert second.flops == 2 * 28 * 28 * 9 * (96 * 128 + 16 * 32)
    assert first.launches == second.launches == 1


def test_launches(floors, layers):
    count = {name: floors.total(floors.stages(layers, name)).launches for name in floors.SCHEDULES}
    # 57 convolutions with batch norm and ReLU, 9 concatenations, 13 + 1 pools, the classifier
    assert count["eager"] == 3 * 57 + 9 + 13 + 1 + 1
    assert count["fused"] == 57 + 13 + 1 + 1
    assert count["merged"] == count["fused"] - 2 * 9
    assert count["engine"] == 2 + 9 * 2 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("schedule", "batch", "wgmma", "mma"),
    [
        ("eager", 1, 26.6, 26.6),
        ("eager", 8, 182, 182),
        ("eager", 128, 2844, 2844),
        ("merged", 1, 11.6, 12.1),
        ("merged", 8, 62, 69),
        ("merged", 256, 1864, 2147),
        ("modules on chip", 1, 9.3, 10.4),
        ("modules on chip", 8, 49, 66),
        ("modules on chip", 32, 193, 261),
        ("modules on chip", 256, 1541, 2084),
    ],
)
def test_microseconds_of_an_h100(floors, layers, schedule, batch, wgmma, mma):
    chain = floors.stages(layers, schedule)
    for roof, want in zip(floors.H100, (wgmma, mma), strict=True):
        rounding = 0.05 if want < 30 else 0.5
        assert floors.seconds(chain, batch, roof) * 1e6 == pytest.approx(want, abs=rounding)


def test_no_schedule_beats_its_flops_and_bytes(floors, layers):
    (roof, _) = floors.H100
    for name in floors.SCHEDULES:
        chain = floors.stages(layers, name)
        whole = floors.total(chain)
        assert whole.flops == sum(layer.flops for layer in layers)
        assert whole.weight_bytes == 2 * sum(layer.weights for layer in layers)
        least = floors.seconds([whole], 8, roof)
        assert floors.seconds(chain, 8, roof) >= least


@pytest.fixture(scope="module")
def training(floors):  # floors has to be importable first
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("floors_training")


def test_a_training_step(floors, training, layers):
    sums = {name: floors.total(training.stages(layers, name)) for name in training.SCHEDULES}
    conv1 = next(layer for layer in layers if layer.name == "conv1")
    assert {s.flops for s in sums.values()} == {3 * 2_996_752_384 - conv1.flops}
    assert sums["eager"].bytes > 1.4 * sums["compiled"].bytes > 2.2 * sums["fused"].bytes
    # Forward alone moves less than the whole, in each way of doing it.
    assert sums["eager"].bytes > 2 * floors.total(floors.stages(layers, "eager")).bytes


@pytest.mark.parametrize("schedule", ["eager", "compiled", "fused"])
def test_a_training_step_of_a_module(floors, training, layers, schedule):
    """3a by hand, in channels at 28 x 28."""
    x, one, reduced, second, pooled, projected = 192, 64, 96 + 16, 128 + 32, 192, 32
    y = one + reduced + second + projected  # what convolutions write
    read = 3 * x + reduced + pooled  # and read: x three times
    output = one + second + projected
    channels = {
        # conv 3 x + 16 y; pool x, y and both gradients; concatenation; three sums
        "eager": 3 * read + 16 * y + 2 * (x + pooled) + 2 * output + 9 * x,
        "compiled": 3 * read + 11 * y + 2 * (x + pooled) + 5 * x,
        # x: forward, wgrad, its gradient, and the pool's forward; the reduced ones three times
        "fused": 3 * x + x + 3 * reduced + 7 * y,
    }[schedule]
    index = {"eager": 8, "compiled": 1, "fused": 1}[schedule]
    (stage,) = training.stages(of(layers, "inception3a"), schedule)
    assert stage.bytes == 784 * (2 * channels + 2 * pooled * index)


def test_everything_grows_with_the_image(floors, layers):
    large = floors.trace(floors.network(), 448)
    pixels = [layer for layer in layers if layer.kind in ("conv", "max_pool")]
    for small, other in zip(pixels, large, strict=False):
        assert (other.x, other.flops, other.weights) == (
            4 * small.x,
            4 * small.flops,
            small.weights,
        )


def test_a_block_that_reads_images(floors):
    (layer,) = floors.trace(inception_ext.BasicConv2d(3, 8, kernel_size=3, padding=1), 16)
    assert layer == floors.Layer("conv", "conv", 3 * 256, 8 * 256, 2 * 8 * 256 * 27, 8 * 28)


def test_rendered(floors, layers):
    text = floors.render(floors.network(), [1], 224, 2)
    assert "2.997 GFLOP an image, 6.62 M parameters" in text
    assert "| inception3a | 8.1 | 6874 | 2559 | 1957 |" in text
