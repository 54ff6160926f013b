"""freeze() on the CUDA kernels, on the emulator and on a GPU where there is one."""

import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from closeness import assert_network_as_good_as_eager
from engine_cases import (
    LAYOUTS,
    OnCPU,
    assert_as_good_as_the_model,
    evaluate,
    images,
    normalised,
    to_device,
)
from fast_path import ARRANGEMENTS
from kernel_devices import each_device, kernels_on, needs_emulator
from torch import Tensor, nn

from inception_ext import _frozen_cuda, functional
from inception_ext.engine import Engine, freeze
from inception_ext.testing import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 as on the CPU, which the errors are held against; TF32 has a test of its own."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@contextmanager
def no_plans() -> Iterator[None]:
    """Every launch on tensors of its own, as within torch.compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_frozen_cuda, "_needs_tensors_of_its_own", lambda x: True)
        yield


# What it computes


@each_device
@pytest.mark.parametrize(
    ("kind", "dtype", "n", "h", "w", "image_dtype", "layout"),
    [
        ("ours", torch.float16, 1, 15, 15, torch.uint8, "nchw"),
        ("ours", torch.bfloat16, 3, 33, 47, torch.float32, "channels_last"),
        ("ours", torch.float32, 1, 33, 47, torch.uint8, "nhwc"),
        ("ours", torch.float16, 3, 64, 64, torch.float32, "nhwc view"),
        ("ours", torch.float16, 1, 47, 33, torch.uint8, "sliced"),
        ("ours", torch.float16, 2, 47, 33, torch.float32, "every other"),
        ("torchvision", torch.float16, 1, 33, 47, torch.float32, "nchw"),
        ("torchvision", torch.float32, 1, 64, 64, torch.float32, "flipped"),
        ("accelerated", torch.bfloat16, 1, 33, 47, torch.uint8, "nhwc view"),
        ("branch3_kernel_size=5", torch.float16, 1, 64, 64, torch.uint8, "channels_last"),
        ("branch3_kernel_size=5", torch.float32, 1, 33, 47, torch.float32, "nchw"),
        ("bvlc", torch.float16, 1, 64, 64, torch.uint8, "nchw"),
        ("bvlc", torch.bfloat16, 1, 33, 47, torch.float32, "nhwc"),
        ("bvlc", torch.float32, 1, 33, 47, torch.uint8, "channels_last"),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_computes_what_the_model_computes(
    models, device, kind, dtype, n, h, w, image_dtype, layout
):
    engine = OnCPU(models[kind], dtype, device)
    x = images(n, h, w)
    given = LAYOUTS[layout](x if image_dtype == torch.uint8 else normalised(x))
    assert_as_good_as_the_model(engine, models[kind], normalised(x), given)


@each_device
def test_images_of_the_usual_size(models, device):
    """224 x 224, the whole network."""
    engine = OnCPU(models["ours"], torch.float16, device)
    x = images(1, 224, 224)
    assert_as_good_as_the_model(engine, models["ours"], normalised(x), x)


@each_device
def test_tf32_where_torch_allows_it(models, device):
    """Ten bits of mantissa, as float16 has: so its errors are the measure."""
    model, x = models["ours"], normalised(images(2, 33, 47))
    expected = evaluate(model, x.double())
    half = evaluate(model, x.half()).double()
    engine = OnCPU(model, torch.float32, device)
    exact = engine(x).double()
    with torch.backends.cudnn.flags(allow_tf32=True):
        tf32 = engine(x).double()
    norm = torch.linalg.vector_norm
    assert 1e-5 < norm(tf32 - exact) / norm(expected) < 2 * norm(half - expected) / norm(expected)
    assert norm(exact - expected) / norm(expected) < 1e-5
    assert torch.equal(engine(x).double(), exact)  # and back again


@each_device
@each_dtype
def test_no_images(models, device, dtype):
    engine = OnCPU(models["ours"], dtype, device)
    for x in (images(0, 64, 64), normalised(images(0, 33, 47)).permute(0, 2, 3, 1)):
        logits = engine(x)
        assert logits.shape == (0, 10) and logits.dtype == dtype


@each_device
@pytest.mark.parametrize("image_dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes_of_images(models, device, image_dtype):
    engine = OnCPU(models["ours"], torch.float16, device)
    x = normalised(images(1, 33, 47)).to(image_dtype)
    assert torch.equal(engine(x), engine(x.float()))


@each_device
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_images_of_any_strides(models, device, arrangement):
    engine = OnCPU(models["ours"], torch.float16, device)
    x = normalised(images(2, 15, 17))
    assert torch.equal(engine(ARRANGEMENTS[arrangement](x)), engine(x))


@each_device
@pytest.mark.parametrize("kind", ["ours", "torchvision"])
def test_transform_input(models, device, kind):
    model = copy.deepcopy(models[kind])
    model.transform_input = True
    engine = OnCPU(model, torch.float16, device)
    x = images(2, 33, 47)
    for given in (x, LAYOUTS["nhwc"](normalised(x))):
        assert_as_good_as_the_model(engine, model, normalised(x), given)


@each_device
@pytest.mark.parametrize("transform_input", [False, True])
def test_exact_at_the_borders(models, device, transform_input):
    """The first convolution pads with zeros of the transformed image, not of the original."""
    model = copy.deepcopy(models["ours"])
    model.transform_input = transform_input
    engine = OnCPU(model, torch.float32, device)
    (segment,) = engine.engine._network._parts
    engine.engine._network._parts = [type(segment)(segment[:1])]
    x = images(2, 33, 47)
    x[0], x[1, :, :, -1] = 0, 255
    with torch.no_grad():
        model.double()
        expected = model.maxpool1(model.conv1(model._transform_input(normalised(x, torch.float64))))
    for given in (x, normalised(x)):
        y = engine(given).double()
        assert (y - expected).abs().max() < 64 * 2**-23 * expected.abs().max()


@each_device
@each_dtype
def test_nan_poisons_its_own_image_only(models, device, dtype):
    engine = OnCPU(models["ours"], dtype, device)
    x = normalised(images(3, 33, 47))
    expected = engine(x)
    x[1, 2, 30, 41] = torch.nan
    logits = engine(x)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2]], expected[[0, 2]])


@each_device
def test_infinities(models, device):
    engine = OnCPU(models["ours"], torch.float16, device)
    x = normalised(images(3, 33, 47))
    expected = engine(x)
    x[0, 0, 0, 0], x[2, 1, 7, 9] = torch.inf, -torch.inf
    logits = engine(x)
    assert not logits[[0, 2]].isfinite().any()
    assert torch.equal(logits[1], expected[1])


@needs_emulator
def test_the_same_bits_for_every_seed(models):
    engine = OnCPU(models["ours"], torch.float16, "emulator").engine
    x = images(1, 33, 47)
    results = []
    for seed in range(4):
        with emulated(seed=seed, workers=1 + seed % 2):
            results.append(engine(x))
    assert all(torch.equal(results[0], other) for other in results[1:])


@each_device
def test_repeats_bit_for_bit(models, device):
    engine = OnCPU(models["ours"], torch.float16, device)
    x = images(3, 33, 47)
    first = engine(x)
    assert torch.equal(engine(x), first) and torch.equal(engine(x), first)
    assert torch.equal(OnCPU(models["ours"], torch.float16, device)(x), first)


# Launches


@needs_emulator
@pytest.mark.parametrize(
    ("kind", "launches"),
    [("ours", 24), ("torchvision", 24), ("branch3_kernel_size=5", 24), ("bvlc", 28)],
)
def test_launches(models, kind, launches):
    """The stem in two, two an Inception module, two pools, the average and the classifier."""
    engine = OnCPU(models[kind], torch.float16, "emulator").engine
    with emulated() as counted:
        engine(images(1, 33, 33))
    assert len(counted) == launches
    assert [c["op"] for c in counted].count("conv_group") == 9 * 2 + 1 + 2 * (kind == "bvlc")
    text = f"Engine({type(models[kind]).__name__}, torch.float16, cpu, "
    count = 18 if kind == "bvlc" else 16
    assert repr(engine) == f"{text}{count} of {count} steps fused)"


@needs_emulator
def test_no_launch_where_kernels_are_turned_off(models):
    engine = OnCPU(models["ours"], torch.float32, "emulator").engine
    x = images(1, 33, 33)
    with emulated() as launches, functional.use_kernels(False):
        logits = engine(x)
    assert launches == []
    assert_network_as_good_as_eager(
        {"logits": logits},
        {"logits": evaluate(models["ours"], normalised(x))},
        {"logits": evaluate(models["ours"], normalised(x).double())},
    )


@each_device
@each_dtype
@pytest.mark.parametrize("kind", ["ours", "bvlc"])
def test_planned_memory_changes_nothing(models, device, dtype, kind):
    """Nor does what is left in it from before."""
    engine = OnCPU(models[kind], dtype, device)
    x = images(2, 33, 47)
    with no_plans():
        expected = engine(x)
    assert torch.equal(engine(x), expected)
    for stream in engine.engine._network._streams.values():
        stream._arena.fill_(0xFF)  # NaN in every dtype
    assert torch.equal(engine(x), expected)
    engine(images(1, 64, 64))
    assert torch.equal(engine(x), expected)


@each_device
def test_logits_are_not_written_to_again(models, device):
    with kernels_on(device, counting=False):
        engine = OnCPU(models["ours"], torch.float16, device).engine
        first = engine(to_device(images(2, 33, 47), device))
        kept = first.clone()
        for seed in (9, 10):
            engine(to_device(images(2, 33, 47, seed=seed), device))
    assert torch.equal(first, kept)


@each_device
def test_images_stay_as_they_are(models, device):
    engine = OnCPU(models["ours"], torch.float16, device).engine
    for x in (images(1, 33, 47), normalised(images(1, 33, 47))):
        given = to_device(x, device)
        with kernels_on(device, counting=False):
            engine(given)
        assert torch.equal(given.cpu(), x)


@needs_emulator
def test_many_shapes(models, monkeypatch):
    """More than are kept, small ones after large ones and back."""
    monkeypatch.setattr(_frozen_cuda, "_MAX_PLANS", 2)
    engine = OnCPU(models["ours"], torch.float16, "emulator")
    sizes = [(1, 15, 15), (2, 31, 17), (1, 15, 16), (1, 15, 15)]
    results = [engine(images(*size)) for size in sizes]
    assert torch.equal(results[0], results[3])
    (stream,) = engine.engine._network._streams.values()
    assert len(stream.plans) == 2
    for size, logits in zip(sizes, results, strict=True):
        with no_plans():
            assert torch.equal(engine(images(*size)), logits)


@needs_emulator
def test_only_the_logits_are_new(models):
    """No other memory is allocated by a call."""
    engine = OnCPU(models["ours"], torch.float16, "emulator").engine
    x = images(1, 15, 15)
    seen = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and not func.is_view:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with emulated(counting=False):
        engine(x)
        with Allocations():
            engine(x)
    assert seen == ["aten.empty.memory_format"]


# Around it


@needs_emulator
def test_within_inference_mode_and_autocast(models):
    x = images(1, 15, 17)
    expected = OnCPU(models["ours"], torch.float16, "emulator")(x)
    with torch.inference_mode():
        engine = OnCPU(models["ours"], torch.float16, "emulator")
        assert torch.equal(engine(x), expected)
    assert torch.equal(engine(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(x), expected)


@needs_emulator
def test_threads(models):
    engine = OnCPU(models["ours"], torch.float16, "emulator").engine
    batches = [images(1, 15, 15, seed=i) for i in range(3)]
    barrier = threading.Barrier(3)
    with emulated(counting=False):
        expected = [engine(x) for x in batches]

        def work(i: int) -> list[Tensor]:
            barrier.wait()
            return [engine(batches[(i + j) % 3]) for j in range(3)]

        with ThreadPoolExecutor(3) as pool:
            for i, results in enumerate(pool.map(work, range(3))):
                for j, logits in enumerate(results):
                    assert torch.equal(logits, expected[(i + j) % 3])


@needs_emulator
@pytest.mark.parametrize("size", [(14, 64), (64, 14), (1, 1), (2, 40)])
def test_images_that_are_too_small(models, size):
    engine = OnCPU(models["ours"], torch.float16, "emulator")
    with pytest.raises(RuntimeError, match="Output size is too small"):
        engine(images(1, *size))
    assert engine(images(1, 15, 15)).isfinite().all()


@needs_emulator
def test_float16_needs_the_kernels(models):
    with emulated(counting=False):
        assert freeze(models["ours"], torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype: expected .* on cpu, got torch\.float16"):
        freeze(models["ours"], torch.float16)


# torch.compile and torch.export


class Doubling(nn.Module):
    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, x: Tensor) -> Tensor:
        return self.engine(x) * 2


@each_device
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["ours", "bvlc"])
def test_compiles_with_fullgraph(models, device, backend, kind):
    engine = OnCPU(models[kind], torch.float16, device).engine
    x = to_device(images(2, 33, 31), device)
    torch.compiler.reset()
    compiled = torch.compile(Doubling(engine), fullgraph=True, backend=backend)
    with kernels_on(device, counting=False):
        assert torch.equal(compiled(x), engine(x) * 2)
        assert torch.equal(compiled(x), engine(x) * 2)
    torch.compiler.reset()


@each_device
def test_compiled_code_notices_new_weights(models, device):
    """And modules, dtypes and hooks."""
    engine = OnCPU(models["ours"], None, device).engine
    x = to_device(images(1, 15, 15), device)
    torch.compiler.reset()
    compiled = torch.compile(Doubling(engine), fullgraph=True, backend="aot_eager")
    changes: list[Callable[[Any], Any]] = [
        lambda model: model.inception3a.branch1.conv.weight.mul_(0.5),
        lambda model: setattr(model, "fc", nn.Linear(1024, 7, device=x.device)),
        lambda model: model.bfloat16(),
        lambda model: model.inception4a.register_forward_hook(lambda _, __, y: y * 1.5),
    ]
    with kernels_on(device), torch.no_grad():
        before = compiled(x)
        for change in changes:
            change(engine.model)
            logits = compiled(x)
            expected = freeze(engine.model)(x) * 2
            assert logits.shape == expected.shape and logits.dtype == expected.dtype
            assert torch.equal(logits, expected)
            assert logits.shape != before.shape or not torch.equal(logits, before)
            before = logits
    torch.compiler.reset()


@needs_emulator
def test_opcheck(models):
    engine = OnCPU(models["ours"], torch.float16, "emulator").engine
    op = torch.ops.inception_ext.call_engine.default
    with emulated(counting=False):
        torch.library.opcheck(op, (images(2, 15, 15), engine._number, 10, torch.float16))


@each_device
def test_exports(models, device):
    """With a dynamic batch, height and width (of which no map shrinks to one pixel)."""
    engine = OnCPU(models["ours"], torch.float16, device).engine
    with kernels_on(device, counting=False):
        dynamic = torch.export.Dim.DYNAMIC
        exported = torch.export.export(
            Doubling(engine),
            (to_device(images(2, 64, 64), device),),
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        )
        x = to_device(images(3, 49, 72), device)
        assert torch.equal(exported.module()(x), engine(x) * 2)
