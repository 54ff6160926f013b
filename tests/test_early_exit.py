"""freeze(model, early_exit=...): images leave at the first classifier that is sure of them."""

import copy

import pytest
import torch
from closeness import assert_network_as_good_as_eager
from fast_path import generator
from kernel_devices import exact_products
from torch import Tensor, nn

import inception_ext
from inception_ext import freeze, functional
from inception_ext._blocks import measure_exits
from inception_ext.early_exit import EarlyExitEngine
from inception_ext.testing import emulated, emulator_error
from inception_ext.training.network import forward_heads


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Its heads are of different opinions, and sure of some images only."""
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(num_classes=5, init_weights=False)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.uniform_(module.bias, 0.4, 0.8)
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
        for head in (model.aux1.fc2, model.aux2.fc2, model.fc):
            head.weight.mul_(0.5)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return 2 * torch.randn(12, 3, 64, 64, generator=generator(3))


def expected(model: nn.Module, images: Tensor, threshold: float) -> tuple[Tensor, list[int]]:
    """Logits, and how many images leave where, by running all the heads on all of them."""
    with torch.no_grad():
        logits = forward_heads(model, images)
    sure = [logits[head].softmax(1).amax(1) >= threshold for head in ("aux1", "aux2")]
    at_aux1, at_aux2 = sure[0], ~sure[0] & sure[1]
    out = torch.where(at_aux2[:, None], logits["aux2"], logits["main"])
    out = torch.where(at_aux1[:, None], logits["aux1"], out)
    left = [int(at_aux1.sum()), int(at_aux2.sum())]
    return out, [*left, len(images) - sum(left)]


def assert_right(logits: Tensor, model: nn.Module, images: Tensor, threshold: float) -> None:
    """Those of each image's exit, as near to float64 as the model's own are."""
    exact = expected(copy.deepcopy(model).double(), images.double(), threshold)[0]
    eager = expected(model, images, threshold)[0]
    assert_network_as_good_as_eager({"logits": logits}, {"logits": eager}, {"logits": exact})


def middle_threshold(model: nn.Module, images: Tensor) -> float:
    """One at which some images leave at each head, and no confidence is near."""
    with torch.no_grad():
        logits = forward_heads(model, images)
    confidences = torch.cat([logits[h].softmax(1).amax(1) for h in ("aux1", "aux2")]).sort().values
    gaps = confidences[1:] - confidences[:-1]
    for i in gaps.argsort(descending=True).tolist():
        threshold = ((confidences[i] + confidences[i + 1]) / 2).item()
        if min(expected(model, images, threshold)[1]) > 0:
            return threshold
    raise AssertionError("the fixture should have images for every exit")


def test_each_image_gets_the_logits_of_its_exit(model, images):
    threshold = middle_threshold(model, images)
    engine = freeze(model, early_exit=threshold)
    _, left = expected(model, images, threshold)
    assert_right(engine(images), model, images, threshold)
    assert list(engine.saved.left.values()) == left
    assert engine.saved.images == 12
    cost = measure_exits(model, 64)
    flops = left[0] * cost.aux1 + left[1] * cost.aux2 + left[2] * cost.main
    assert engine.saved.share == pytest.approx(1 - flops / (12 * cost.plain))
    assert f"{left[0]} at aux1, {left[1]} at aux2, {left[2]} at main" in str(engine.saved)


def test_nobody_leaves_at_one_and_everybody_at_next_to_nothing(model, images):
    with torch.no_grad():
        logits = forward_heads(model, images)
    never = freeze(model, early_exit=1.0)
    assert logits["aux1"].softmax(1).amax() < 1
    torch.testing.assert_close(never(images), freeze(model)(images))
    assert never.saved.left == {"aux1": 0, "aux2": 0, "main": 12}
    assert never.saved.share < 0  # the heads on the way cost something

    always = freeze(model, early_exit=1e-6)
    assert_right(always(images), model, images, 1e-6)
    assert always.saved.left == {"aux1": 12, "aux2": 0, "main": 0}
    assert always.saved.share > 0


def test_the_rest_of_the_network_sees_only_who_goes_on(model, images, monkeypatch):
    threshold = middle_threshold(model, images)
    _, left = expected(model, images, threshold)
    engine = freeze(model, early_exit=threshold)
    kind = type(engine._network.parts[0])
    call, seen = kind.__call__, []
    monkeypatch.setattr(kind, "__call__", lambda self, x: seen.append(len(x)) or call(self, x))
    engine(images)
    assert seen == [12, 12 - left[0], left[2]]


def test_the_count_goes_on_until_it_is_reset(model, images):
    engine = freeze(model, early_exit=0.5)
    engine(images)
    engine(images[:5, :, :48, :48])
    assert engine.saved.images == 17
    engine.saved.reset()
    assert engine.saved.images == 0
    assert engine.saved.share == 0.0


def test_kinds_of_images(model, images):
    threshold = middle_threshold(model, images)
    engine = freeze(model, early_exit=threshold)
    assert_right(engine(images.permute(0, 2, 3, 1)), model, images, threshold)
    assert engine(images[:0]).shape == (0, 5)
    one = torch.cat([engine(image[None]) for image in images])
    assert_right(one, model, images, threshold)
    pixels = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8, generator=generator(1))
    plain = freeze(model, early_exit=1.0)
    torch.testing.assert_close(plain(pixels), freeze(model)(pixels))


def test_nan_is_not_sure_of_anything(model, images):
    engine = freeze(model, early_exit=1e-6)
    broken = images[:3].clone()
    broken[1] = float("nan")
    logits = engine(broken)
    assert logits[1].isnan().all()
    assert not logits[[0, 2]].isnan().any()
    assert engine.saved.left == {"aux1": 2, "aux2": 0, "main": 1}


def test_new_weights_are_noticed(model, images):
    twin = copy.deepcopy(model)
    engine = freeze(twin, early_exit=1e-6)
    assert_right(engine(images), model, images, 1e-6)
    with torch.no_grad():
        twin.aux1.fc2.bias.add_(1)
    assert_right(engine(images), twin, images, 1e-6)


def test_bfloat16(model, images):
    engine = freeze(model, torch.bfloat16, early_exit=0.5)
    logits = engine(images)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert engine.saved.images == 12


def test_the_paper_network(images):
    torch.manual_seed(0)
    model = inception_ext.bvlc_googlenet(5).eval()
    engine = freeze(model, early_exit=1e-6)
    assert_right(engine(images), model, images, 1e-6)


def test_without_kernels(model, images):
    threshold = middle_threshold(model, images)
    with functional.use_kernels(False):
        got = freeze(model, early_exit=threshold)(images)
    assert_right(got, model, images, threshold)


@pytest.mark.skipif(emulator_error() is not None, reason="no emulator in this build")
def test_on_the_cuda_kernels(model, images):
    twin = copy.deepcopy(model)
    for conv in (twin.conv1, twin.conv2, twin.conv3):  # called as they are, between the launches
        conv.register_forward_hook(lambda *_: None)
    threshold = middle_threshold(model, images)
    with exact_products(), emulated(checks=False, counting=False):
        engine = freeze(twin, early_exit=threshold)
        assert type(engine._network.parts[1]).__name__ == "FusedNetwork"
        got = engine(images)
    _, left = expected(model, images, threshold)
    assert_right(got, model, images, threshold)
    assert list(engine.saved.left.values()) == left


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.0, ValueError, "early_exit: expected above 0, at most 1, got 0.0"),
        (1.5, ValueError, "early_exit: expected above 0, at most 1, got 1.5"),
        (float("nan"), ValueError, "early_exit: expected above 0, at most 1, got nan"),
        ("0.9", TypeError, "early_exit: expected a number, got '0.9'"),
        (True, TypeError, "early_exit: expected a number, got True"),
    ],
)
def test_thresholds_that_cannot_be(value, error, message, model):
    with pytest.raises(error, match=message):
        freeze(model, early_exit=value)


def test_a_model_without_heads():
    model = inception_ext.GoogLeNet(5, aux_logits=False, init_weights=False)
    with pytest.raises(ValueError, match="early_exit: the model has no aux1"):
        freeze(model, early_exit=0.9)


def test_repr(model):
    engine = freeze(model, early_exit=0.9)
    assert isinstance(engine, EarlyExitEngine)
    assert "early exit at 0.9" in repr(engine)
    assert "16 of 16 steps fused" in repr(engine)
