"""freeze() on a GPU: streams, devices, graphs, memory. What it computes: test_engine_kernels.py."""

import copy
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_cases import assert_logits_as_good_as_the_models, images, make_models, normalised
from torch import Tensor, nn

from inception_ext import _frozen_cuda
from inception_ext.engine import Engine, freeze

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(scope="module")
def models(tv_googlenet: Any) -> dict[str, nn.Module]:
    """One of each kind, in evaluation mode, on the CPU; not to be changed."""
    return make_models(tv_googlenet)


def frozen(model: nn.Module, dtype: torch.dtype = torch.float16, device: str = "cuda") -> Engine:
    return freeze(copy.deepcopy(model).to(device), dtype)


def replays(engine: Engine) -> int:
    """How many shapes have become graphs, over all streams."""
    streams = engine._network._streams.values()
    return sum(plan._graph is not None for stream in streams for plan in stream.plans.values())


@each_dtype
@pytest.mark.parametrize("kind", ["ours", "bvlc"])
def test_graphs_compute_the_same(models, kind, dtype):
    """The first call launches, the second captures, the third replays; inputs lie anywhere."""
    engine = frozen(models[kind], dtype)
    for n in (1, 8):
        batches = [images(n, 224, 224, seed=i).cuda() for i in range(4)]
        expected = [frozen(models[kind], dtype)(x) for x in batches]
        assert all(torch.equal(engine(x), y) for x, y in zip(batches, expected, strict=True))
        for x, y in zip(batches, expected, strict=True):
            assert torch.equal(engine(x), y)
            assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last)), y)
    assert replays(engine) == 2


@each_dtype
def test_batches(models, dtype):
    with torch.backends.cudnn.flags(allow_tf32=False):
        engine = frozen(models["ours"], dtype)
        for n in (1, 3, 32):
            x = images(n, 224, 224)
            given = x.cuda()
            for _ in range(3):
                logits = engine(given).cpu()
            assert_logits_as_good_as_the_models(logits, models["ours"], normalised(x))


def test_a_call_waits_for_nothing_and_allocates_the_logits(models):
    engine = frozen(models["ours"])
    x = images(8, 224, 224).cuda()
    for _ in range(3):
        engine(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = engine(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    assert logits.isfinite().all()


def test_launches(models):
    """24 kernels, also as a graph."""
    engine = frozen(models["ours"])
    x = images(8, 224, 224).cuda()
    for _ in range(3):
        engine(x)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine(x)
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in on_gpu]
    assert len(names) == 24 and all("inception_ext" in name for name in names), names


def test_logits_are_not_written_to_again(models):
    engine = frozen(models["ours"])
    batches = [images(2, 64, 64, seed=i).cuda() for i in range(6)]
    results = [engine(x) for x in batches]
    copies = [y.clone() for y in results]
    for x in batches:
        engine(x)
    assert all(torch.equal(y, kept) for y, kept in zip(results, copies, strict=True))
    assert len({y.data_ptr() for y in results}) == len(results)


def test_other_streams(models):
    """Work goes to the current stream; two streams do not share memory."""
    engine = frozen(models["ours"])
    batches = [images(4, 96, 96, seed=i).cuda() for i in range(2)]
    expected = [engine(x) for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(engine(batches[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(y, expected[i]) for y in results[i])


def test_work_is_ordered_on_its_stream(models):
    """What is queued before the call is seen by it, and what comes after sees the logits."""
    engine = frozen(models["ours"])
    x = normalised(images(4, 96, 96)).half().cuda()
    expected = engine(x * 2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            given = torch.zeros_like(x)
            torch.cuda._sleep(20_000_000)
            given.copy_(x).mul_(2)
            y = engine(given) + 0
            given.zero_()
            stream.synchronize()
            assert torch.equal(y, expected)


def test_threads(models):
    """On one stream, and on one each."""
    engine = frozen(models["ours"])
    batches = [images(2, 64, 64, seed=i).cuda() for i in range(4)]
    expected = [engine(x) for x in batches]
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)

    def work(i: int, own_stream: bool) -> bool:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        barrier.wait()
        with torch.cuda.stream(stream):
            results = [engine(batches[(i + j) % 4]) for j in range(16)]
            stream.synchronize()
        return all(torch.equal(y, expected[(i + j) % 4]) for j, y in enumerate(results))

    with ThreadPoolExecutor(4) as pool:
        for own_stream in (False, True):
            assert all(pool.map(work, range(4), [own_stream] * 4))


def test_many_shapes(models, monkeypatch):
    """More shapes than are kept, growing and shrinking."""
    monkeypatch.setattr(_frozen_cuda, "_MAX_PLANS", 4)
    engine = frozen(models["ours"])
    sizes = [(1 + i % 3, 32 + 9 * i, 48 + 5 * (7 - i)) for i in range(8)]
    batches = [images(*size).cuda() for size in sizes]
    expected = [frozen(models["ours"])(x) for x in batches]
    for _ in range(3):
        for x, y in zip(batches, expected, strict=True):
            assert torch.equal(engine(x), y)
            assert torch.equal(engine(x), y)
    (stream,) = engine._network._streams.values()
    assert len(stream.plans) == 4


def test_many_streams(models):
    engine = frozen(models["ours"])
    x = images(2, 64, 64).cuda()
    expected = engine(x)
    torch.cuda.synchronize()
    for stream in [torch.cuda.Stream() for _ in range(2 * _frozen_cuda._MAX_STREAMS)]:
        with torch.cuda.stream(stream):
            results = [engine(x) for _ in range(3)]
        stream.synchronize()
        assert all(torch.equal(y, expected) for y in results)
    assert len(engine._network._streams) == _frozen_cuda._MAX_STREAMS


@pytest.mark.parametrize("warm", [False, True])
def test_within_a_graph_of_the_caller(models, warm):
    engine = frozen(models["ours"])
    first, second = (images(2, 96, 96, seed=i).cuda() for i in range(2))
    expected = [frozen(models["ours"])(x) for x in (first, second)]
    for _ in range(3 if warm else 1):  # loads the kernels
        engine(first)
    x = first.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine(x)
    for given, logits in zip((first, second), expected, strict=True):
        x.copy_(given)
        engine(second)  # does not disturb it
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, logits)


def test_new_weights_are_seen_by_the_graph(models):
    engine = frozen(models["ours"])
    x = images(2, 96, 96).cuda()
    for _ in range(3):
        before = engine(x)
    with torch.no_grad():
        engine.model.inception4c.branch2[1].conv.weight.mul_(0.5)
    expected = freeze(engine.model, torch.float16)(x)
    for _ in range(3):
        assert torch.equal(engine(x), expected)
    assert not torch.equal(before, expected)


def test_settings_of_tf32_are_followed_by_the_graph(models):
    engine = frozen(models["ours"], torch.float32)
    x = images(2, 96, 96).cuda()
    results = []
    for allowed in (True, False, True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            results.append([engine(x) for _ in range(3)])
            assert all(torch.equal(y, results[-1][0]) for y in results[-1])
    assert torch.equal(results[0][0], results[2][0]) and torch.equal(results[1][0], results[3][0])
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_device_that_is_not_current(models):
    engine = frozen(models["ours"], device="cuda:1")
    x = images(2, 96, 96)
    expected = frozen(models["ours"])(x.cuda())
    for _ in range(3):
        logits = engine(x.to("cuda:1"))
        assert logits.device == torch.device("cuda:1")
        assert torch.equal(logits.cpu(), expected.cpu())
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match="images: expected device cuda:1, got cuda:0"):
        engine(x.cuda())


def test_model_that_moves(models):
    engine = frozen(models["ours"], torch.float32)
    x = images(1, 64, 64)
    on_gpu = engine(x.cuda()).cpu()
    engine.model.cpu()
    torch.testing.assert_close(engine(x), on_gpu, rtol=0.02, atol=0.02)
    engine.model.cuda()
    assert torch.equal(engine(x.cuda()).cpu(), on_gpu)


SCRIPT = """
    import torch, inception_ext
    torch.manual_seed(0)
    model = inception_ext.googlenet(num_classes=10, init_weights=False, aux_logits=False)
    for dtype in (torch.float16, torch.float32):
        engine = inception_ext.freeze(model.cuda().eval(), dtype)
        for size in ((2, 3, 64, 64), (1, 3, 33, 47)):
            for _ in range(3):
                engine(torch.randn(size, device="cuda"))
    torch.cuda.synchronize()
"""


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    kernels = ["--kernel-name-exclude", "regex=at::"] if tool == "initcheck" else []
    done = subprocess.run(
        [*command, *kernels, sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
