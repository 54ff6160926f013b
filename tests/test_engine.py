"""freeze(): what the model computes in evaluation mode, whatever has happened to the model."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from closeness import assert_network_as_good_as_eager
from engine_cases import (
    KINDS,
    LAYOUTS,
    assert_as_good_as_the_model,
    assert_logits_as_good_as_the_models,
    evaluate,
    images,
    normalised,
)
from fast_path import ARRANGEMENTS, CalledOps
from torch import Tensor, nn

from inception_ext import _frozen, functional
from inception_ext.engine import Engine, freeze
from inception_ext.modules import Inception

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


# What it computes

# Every size, number of images, dtype and layout, if not all of their combinations: (N, H, W, ...).
INPUTS = [
    (1, 15, 15, torch.uint8, "nchw"),
    (3, 15, 15, torch.float32, "nhwc"),
    (1, 33, 47, torch.float32, "nchw"),
    (3, 33, 47, torch.uint8, "channels_last"),
    (1, 33, 47, torch.uint8, "nhwc view"),
    (1, 64, 64, torch.float32, "channels_last"),
    (3, 64, 64, torch.uint8, "nhwc"),
    (0, 64, 64, torch.uint8, "nchw"),
    (0, 33, 47, torch.float32, "nhwc"),
    (2, 47, 33, torch.uint8, "sliced"),
    (2, 47, 33, torch.float32, "every other"),
]


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_the_model_computes(models, kind, dtype):
    model = models[kind]
    engine = freeze(model, dtype)
    for n, h, w, image_dtype, layout in INPUTS:
        h, w = (max(h, 31), max(w, 31)) if kind == "bvlc" else (h, w)
        x = images(n, h, w)
        given = x if image_dtype == torch.uint8 else normalised(x)
        logits = engine(LAYOUTS[layout](given))
        assert logits.shape == (n, 10) and logits.dtype == dtype
        if n:
            assert_as_good_as_the_model(engine, model, normalised(x), LAYOUTS[layout](given))


def test_other_float_dtypes_of_images(models):
    engine = freeze(models["ours"])
    x = normalised(images(2, 33, 47))
    expected = engine(x)
    torch.testing.assert_close(engine(x.double()), expected)
    torch.testing.assert_close(engine(x.half()), engine(x.half().float()))
    torch.testing.assert_close(engine(x.bfloat16()), engine(x.bfloat16().float()))


def test_expanded_images(models):
    engine = freeze(models["ours"])
    x = images(1, 33, 47)
    many = engine(x.expand(3, -1, -1, -1))
    torch.testing.assert_close(many, engine(x).expand(3, -1))
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(engine(grey), engine(grey.contiguous()))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_images_of_any_strides(models, arrangement):
    engine = freeze(models["ours"])
    x = normalised(images(2, 33, 47))
    assert torch.equal(engine(ARRANGEMENTS[arrangement](x)), engine(x))


def test_dtype_of_the_model(models):
    model = copy.deepcopy(models["ours"]).bfloat16()
    assert freeze(model).dtype == torch.bfloat16
    engine = freeze(model, torch.float32)
    x = normalised(images(2, 33, 47))
    assert_network_as_good_as_eager(
        {"logits": engine(x)},
        {"logits": evaluate(model.float(), x)},
        {"logits": evaluate(model.double(), x.double())},
    )
    assert freeze(model, torch.float32)(x).dtype == torch.float32  # of a model in float64


def test_a_subclass_of_tensor(models, torchvision):
    from torchvision import tv_tensors

    engine = freeze(models["ours"])
    x = images(1, 33, 47)
    logits = engine(tv_tensors.Image(x))
    assert type(logits) is Tensor and torch.equal(logits, engine(x))


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_fused(models, kind):
    """No step is left to the model's own code."""
    engine = freeze(models[kind])
    steps = 18 if kind == "bvlc" else 16
    fused = steps - 2 if kind == "bvlc" else steps  # local response normalisation is torch's
    name = type(models[kind]).__name__
    text = f"Engine({name}, torch.float32, cpu, {fused} of {steps} steps fused)"
    assert repr(engine) == text
    with CalledOps() as called:
        engine(images(1, 96, 96))
    assert called.names.count("image_to_nhwc") == 1
    # Stem and body are one op each, but for what local response normalisations part.
    assert called.names.count("frozen_forward") == (4 if kind == "bvlc" else 2)
    assert "max_pool_forward" not in called.names


# transform_input and normalisation


@each_dtype
@pytest.mark.parametrize("kind", ["ours", "torchvision", "accelerated"])
def test_transform_input(models, kind, dtype):
    model = copy.deepcopy(models[kind])
    model.transform_input = True
    engine = freeze(model, dtype)
    x = images(2, 33, 47)
    for given in (x, normalised(x), LAYOUTS["nhwc"](normalised(x))):
        assert_as_good_as_the_model(engine, model, normalised(x), given)


def first_convolution(engine: Engine, x: Tensor) -> Tensor:
    return engine._network.stem[0](engine._load(x))


@pytest.mark.parametrize("transform_input", [False, True])
def test_exact_at_the_borders(models, transform_input):
    """The first convolution pads with zeros of the transformed image, not of the original."""
    model = copy.deepcopy(models["ours"])
    model.transform_input = transform_input
    engine = freeze(model)
    x = images(2, 33, 47)
    x[0], x[1, :, :, -1] = 0, 255
    with torch.no_grad():
        expected = model.double().conv1(model._transform_input(normalised(x, torch.float64)))
        for given in (x, normalised(x)):
            y = first_convolution(engine, given).double()
            assert (y - expected).abs().max() < 64 * 2**-23 * expected.abs().max()


def test_uint8_is_the_normalised_float(models):
    """As the transforms that come with the published weights normalise."""
    for transform_input in (False, True):
        model = copy.deepcopy(models["ours"])
        model.transform_input = transform_input
        engine = freeze(model)
        x = images(2, 33, 47)
        torch.testing.assert_close(engine._load(x), engine._load(normalised(x)), rtol=0, atol=4e-6)
        for given in (x, normalised(x)):
            assert_as_good_as_the_model(engine, model, normalised(x), given)


def test_another_normalisation(models):
    x = images(2, 33, 47)
    engine = freeze(models["ours"], mean=(0.0, 0.1, 0.2), std=(1.0, 0.5, 0.25))
    given = (x / 255 - torch.tensor([0.0, 0.1, 0.2]).view(3, 1, 1)) / torch.tensor(
        [1.0, 0.5, 0.25]
    ).view(3, 1, 1)
    assert_as_good_as_the_model(engine, models["ours"], given, x)
    plain = freeze(models["ours"], mean=[0] * 3, std=[1 / 255] * 3)
    assert_as_good_as_the_model(plain, models["ours"], x.float(), x)


# Around it


def test_leaves_the_model_as_it_is(model):
    model.train()
    model.aux1.eval()
    model.inception4a.register_forward_hook(lambda *_: None)  # called, and its batch norms with it
    model.avgpool.register_forward_hook(lambda *_: None)
    modes = {name: m.training for name, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    engine = freeze(model)
    x = normalised(images(2, 33, 47)).requires_grad_()
    logits = engine(x)
    assert not logits.requires_grad and torch.is_grad_enabled()
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert all(torch.equal(after[k], state[k]) for k in state)
    assert all(p.grad is None for p in model.parameters())
    assert_as_good_as_the_model(engine, model, x.detach())

    model.inception4a.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine(x)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.is_grad_enabled()


def test_images_stay_as_they_are(models):
    engine = freeze(models["ours"])
    for x in (images(1, 33, 47), normalised(images(1, 33, 47))):
        for arrange in LAYOUTS.values():
            given = arrange(x)
            before = given.clone()
            engine(given)
            assert torch.equal(given, before)


def test_logits_are_not_written_to_again(models):
    engine = freeze(models["ours"])
    first = engine(images(2, 33, 47))
    kept = first.clone()
    engine(images(2, 33, 47, seed=9))
    assert torch.equal(first, kept)


def test_within_autocast_and_inference_mode(models):
    engine = freeze(models["ours"])
    x = images(1, 33, 47)
    expected = engine(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(x), expected)
    with torch.inference_mode():
        assert torch.equal(engine(x), expected)


def test_models_with_hooks_within_autocast(model):
    model.inception4a.register_forward_hook(lambda *_: None)
    model.fc.register_forward_hook(lambda *_: None)
    engine = freeze(model)
    x = images(1, 33, 47)
    expected = engine(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = engine(x)
    assert torch.equal(logits, expected)


def test_repeats_bit_for_bit(models):
    x = images(3, 47, 33)
    engine = freeze(models["ours"])
    first = engine(x)
    for _ in range(3):
        assert torch.equal(engine(x), first)
    assert torch.equal(freeze(models["ours"])(x), first)


@each_dtype
def test_sizes_one_after_another(models, dtype):
    engine = freeze(models["ours"], dtype)
    for size in ((15, 15), (64, 64), (33, 47), (64, 64), (33, 47)):
        x = images(2, *size)
        assert_as_good_as_the_model(engine, models["ours"], normalised(x), x)


def test_a_copy_of_an_engine_that_has_run(models):
    engine = freeze(models["ours"])
    x = images(2, 33, 47)
    assert torch.equal(copy.deepcopy(engine)(x), engine(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_threads(model, hooked):
    """With a hook, modules in training mode are called, and must not be seen in that mode."""
    model.train()
    if hooked:
        model.inception4a.register_forward_hook(lambda *_: None)
        model.dropout = nn.Dropout(0.9)
        model.dropout.register_forward_hook(lambda *_: None)
    engine = freeze(model)
    batches = [images(1, 33, 47, seed=i) for i in range(4)]
    expected = [engine(x) for x in batches]
    barrier = threading.Barrier(4)

    def work(i: int) -> list[Tensor]:
        barrier.wait()
        return [engine(batches[(i + j) % 4]) for j in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            for j, logits in enumerate(results):
                assert torch.equal(logits, expected[(i + j) % 4])
    assert model.training and model.inception4a.branch1.bn.training


@each_dtype
def test_nan_poisons_its_own_image_only(models, dtype):
    engine = freeze(models["ours"], dtype)
    x = normalised(images(4, 64, 64))
    expected = engine(x)
    x[1, 2, 30, 41] = torch.nan
    logits = engine(x)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2, 3]], expected[[0, 2, 3]])


def test_infinities_and_overflow(models):
    """What is not finite in the model's logits is not finite in the engine's."""
    engine = freeze(models["ours"])
    x = normalised(images(5, 64, 64))
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.inf, -torch.inf
    x[2] *= 1e38
    x[3] *= 1e30
    with torch.no_grad():
        expected = models["ours"](x)
    logits = engine(x)
    assert not expected[:3].isfinite().any() and expected[4].isfinite().all()
    assert not logits[expected.isfinite().logical_not()].isfinite().any()
    assert_logits_as_good_as_the_models(logits[4:], models["ours"], x[4:])


@pytest.mark.parametrize(
    "name", ["conv1.conv.weight", "inception4a.branch2.1.bn.running_var", "fc.bias"]
)
def test_a_model_that_has_diverged(model, name):
    """NaN among the weights is not hidden by a ReLU."""
    engine = freeze(model)
    x = normalised(images(1, 64, 64))
    assert engine(x).isfinite().all()
    model.load_state_dict(
        {name: torch.full_like(model.state_dict()[name], torch.nan)}, strict=False
    )
    assert engine(x).isnan().all()


def test_relu_is_zero_below_zero(models):
    """Or as good as: NaN passes through a slope of 1e-30."""
    engine = freeze(models["ours"])
    x = engine._load(images(1, 64, 64))
    y = engine._network.stem[0](x)
    with torch.no_grad():
        expected = models["ours"].conv1(x)
    assert (expected == 0).any() and (y[expected == 0].abs() < 1e-28).all()


# Without the fast parts


@each_dtype
def test_without_onednns_fused_convolution(models, monkeypatch, dtype):
    model, x = models["ours"], images(2, 33, 47)
    monkeypatch.setattr(_frozen, "has_fused_convolution", lambda x: False)
    engine = freeze(model, dtype)
    assert_as_good_as_the_model(engine, model, normalised(x), x)


def test_with_onednn_turned_off(models):
    engine = freeze(models["ours"])
    x = images(2, 33, 47)
    engine(x)
    with torch.backends.mkldnn.flags(enabled=False):
        logits = engine(x)
    assert_logits_as_good_as_the_models(logits, models["ours"], normalised(x))


@each_dtype
@pytest.mark.parametrize("kind", ["ours", "torchvision", "bvlc"])
def test_without_kernels(models, kind, dtype):
    model = models[kind]
    for n, h, w, image_dtype, layout in INPUTS[2:8]:
        x = images(n, h, w)
        given = LAYOUTS[layout](x if image_dtype == torch.uint8 else normalised(x))
        with functional.use_kernels(False), CalledOps() as called:
            engine = freeze(model, dtype)
            logits = engine(given)
            if n:
                assert_as_good_as_the_model(engine, model, normalised(x), given)
        assert called.names == []
        assert logits.shape == (n, 10)


def test_transform_input_without_kernels(model):
    model.transform_input = True
    x = images(2, 33, 47)
    engine = freeze(model)
    for given in (x, normalised(x)):
        with functional.use_kernels(False):
            assert_as_good_as_the_model(engine, model, normalised(x), given)


# Bad input


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"expected 4D input \(got 3D input\)"),
        (torch.zeros(1, 1, 3, 32, 32), ValueError, r"expected 4D input \(got 5D input\)"),
        (torch.zeros(2, 4, 32, 32), ValueError, r"images: expected shape .*, got \[2, 4, 32, 32\]"),
        (torch.zeros(2, 32, 32, 4), ValueError, r"images: expected shape .*, got \[2, 32, 32, 4\]"),
        (torch.zeros(2, 1, 32, 32), ValueError, r"images: expected shape .*, got \[2, 1, 32, 32\]"),
        (torch.zeros(2, 3, 32, 32).long(), TypeError, "images: expected .*, got torch.int64"),
        (torch.zeros(2, 3, 32, 32).bool(), TypeError, "images: expected .*, got torch.bool"),
        (torch.zeros(2, 3, 32, 32).to(torch.complex64), TypeError, "got torch.complex64"),
        (torch.zeros(2, 3, 32, 32, device="meta"), RuntimeError, "expected device cpu, got meta"),
        (torch.zeros(2, 3, 14, 14), RuntimeError, "Output size is too small"),
        (torch.zeros(2, 3, 0, 32), RuntimeError, ""),
        (torch.zeros(2, 3, 32, 32).to_sparse(), TypeError, "images: expected .*torch.sparse_coo"),
        ([[1.0]], TypeError, "images: expected a dense Tensor, got list"),
        (None, TypeError, "images: expected a dense Tensor, got NoneType"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value[:30],
)
def test_bad_images(models, images, error, text):
    engine = freeze(models["ours"])
    for enabled in (True, False):
        with functional.use_kernels(enabled), pytest.raises(error, match=text):
            engine(images)
    assert engine(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_bad_arguments(models):
    with pytest.raises(TypeError, match="model: expected a GoogLeNet, got a Linear without conv1"):
        freeze(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="model: expected a GoogLeNet, got a str"):
        freeze("model")
    text = r"got a DataParallel without its children; pass its \.module$"
    with pytest.raises(TypeError, match=text):
        freeze(nn.DataParallel(models["ours"]))
    x = torch.zeros(1, 3, 32, 32)
    for traced in (torch.fx.symbolic_trace(models["ours"]), torch.jit.trace(models["ours"], x)):
        with pytest.raises(TypeError, match="got a scripted or traced one"):
            freeze(traced)
    with pytest.raises(TypeError, match="got a Inception without conv1"):
        freeze(Inception(8, 8, 8, 8, 8, 8, 8))
    model = copy.deepcopy(models["ours"])
    del model.inception4c
    with pytest.raises(TypeError, match=r"GoogLeNet without inception4c$"):
        freeze(model)
    for dtype in (torch.float64, torch.float16, torch.int32):
        text = f"dtype: expected torch.float32 or torch.bfloat16 on cpu, got {dtype}"
        with pytest.raises(ValueError, match=text):
            freeze(models["ours"], dtype)
    with pytest.raises(ValueError, match=r"dtype: expected .* got torch\.float64"):
        freeze(copy.deepcopy(models["ours"]).double())
    with pytest.raises(ValueError, match="mean and std: expected 3 values each, got 2 and 3"):
        freeze(models["ours"], mean=(0.5, 0.5))
    with pytest.raises(ValueError, match="mean and std: expected 3 values each, got 3 and 4"):
        freeze(models["ours"], std=(0.5,) * 4)
    with pytest.raises(ValueError, match=r"std: expected values above 0, got .*0\.0"):
        freeze(models["ours"], std=(0.5, 0.5, 0.0))


def test_a_compiled_and_a_wrapped_model(models):
    """What wraps a model passes its children on."""
    x = images(1, 33, 47)
    expected = freeze(models["ours"])(x)
    assert torch.equal(freeze(torch.compile(models["ours"]))(x), expected)
