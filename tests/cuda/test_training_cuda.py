"""Training on a GPU: digits, determinism, streams, graphs, memory. What each op computes:
test_training_kernels.py and the other test_training_*.py, on both devices."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
from fast_path import randn
from torch import Tensor, nn
from training_cases import assert_equal, gradients, small_googlenet
from training_runs import environment

from inception_ext import GoogLeNetLoss
from inception_ext.cli import main

LABELS = torch.arange(8)


def network(narrow: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return small_googlenet(narrow).cuda().to(memory_format=torch.channels_last)


def forward_backward(model: nn.Module, images: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast("cuda", amp, enabled=amp is not None):
        loss = GoogLeNetLoss()(model(images), LABELS[: len(images)].to(images.device))
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, images: Tensor, amp: torch.dtype | None) -> dict[str, Tensor]:
    model.zero_grad()
    found = {"loss": forward_backward(model, images, amp)} | gradients(model)
    return {k: v.clone() for k, v in (found | dict(model.named_buffers())).items()}


each_amp = pytest.mark.parametrize(
    "amp", [None, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [[], ["--amp", "fp16"]], ids=["fp32", "fp16"])
def test_digits(tmp_path, amp):
    """The command learns to tell handwritten digits that it has not seen."""
    recipe = "train digits --epochs 12 --opt adamw --lr 1e-3 --wd 0.05 --train-crop-size 32"
    options = ["--device", "cuda", "--output-dir", str(tmp_path / "run")]
    assert main([*recipe.split(), *amp, *options]) == 0
    facts = json.loads((tmp_path / "run" / "epochs.json").read_text())
    assert facts["best_accuracy_main"] >= 0.97


# What is started, and when


@each_amp
def test_steps_repeat_bit_for_bit(amp):
    images = randn(8, 3, 96, 96).cuda()
    with torch.backends.cudnn.flags(deterministic=True):  # of what stays with cuDNN and cuBLAS
        first, second = (results_of(network(), images, amp) for _ in range(2))
    assert_equal(first, second)


@each_amp
def test_a_step_waits_for_nothing(amp):
    model, images = network(), randn(8, 3, 96, 96).cuda()
    labels = LABELS.cuda()
    criterion = GoogLeNetLoss()
    forward_backward(model, images, amp)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", amp, enabled=amp is not None):
            loss = criterion(model(images), labels)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@each_amp
def test_on_another_stream(amp):
    images = randn(4, 3, 64, 64).cuda()
    with torch.backends.cudnn.flags(deterministic=True):
        expected = results_of(network(), images, amp)
        model, stream = network(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # work before it, which is to be waited for
            given = torch.zeros_like(images).copy_(images)
            found = results_of(model, given, amp)
        torch.cuda.current_stream().wait_stream(stream)
    assert_equal(found, expected)


@each_amp
def test_within_a_graph(amp):
    """Captured once, a step's replays train as its calls do."""
    batches = [randn(4, 3, 64, 64, seed=seed).cuda() for seed in range(3)]
    captured, called = network(), network()
    given, stream = batches[0].clone(), torch.cuda.Stream()
    state = {name: value.clone() for name, value in captured.state_dict().items()}

    def step(model: nn.Module, images: Tensor) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        return forward_backward(model, images, amp)

    labels = LABELS.cuda()  # so that no copy from the host is captured
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(deterministic=True):
        patch.setitem(globals(), "LABELS", labels)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(captured, given)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(captured, given)
        captured.load_state_dict(state)  # in place
        for images in batches:
            given.copy_(images)
            graph.replay()
            assert torch.equal(loss, step(called, images))
            assert_equal(gradients(captured), gradients(called))
    assert_equal(dict(captured.named_buffers()), dict(called.named_buffers()))


# Memory


def allocated(run: Callable[[], object], times: int) -> int:
    for _ in range(times):
        run()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@each_amp
def test_50_steps_do_not_grow(amp):
    model, images = network(), randn(8, 3, 96, 96).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        forward_backward(model, images, amp)
        optimizer.step()

    before = allocated(step, 10)
    assert allocated(step, 40) == before


def test_saved_tensors_on_the_host():
    """They come back without their strides."""
    images = randn(4, 3, 64, 64).cuda()
    with torch.backends.cudnn.flags(deterministic=True):
        expected = results_of(network(), images, torch.float16)
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            found = results_of(network(), images, torch.float16)
    assert_equal(found, expected)


# Processes


STEP = """
    import torch, inception_ext
    torch.manual_seed(0)
    model = inception_ext.googlenet(num_classes=10, init_weights=False).cuda()
    criterion = inception_ext.GoogLeNetLoss()
    for amp in (None, torch.float16, torch.bfloat16):
        for size in ((2, 3, 64, 64), (3, 3, 33, 47)):
            images = torch.randn(size, device="cuda")
            runs = []
            for _ in range(RUNS):
                torch.manual_seed(1)  # of the dropout
                model.zero_grad()
                with torch.autocast("cuda", amp, enabled=amp is not None):
                    loss = criterion(model(images), torch.arange(size[0], device="cuda"))
                loss.backward()
                runs.append([loss.detach(), *(p.grad for p in model.parameters())])
            for other in runs[1:]:
                assert all(map(torch.equal, other, runs[0]))
    torch.cuda.synchronize()
"""


def script(runs: int, before: str = "") -> str:
    return before + "\n" + textwrap.dedent(STEP.replace("RUNS", str(runs)))


def test_deterministic_algorithms():
    """Nothing refuses to run, and steps repeat bit for bit."""
    done = subprocess.run(
        [sys.executable, "-c", script(3, "import torch; torch.use_deterministic_algorithms(True)")],
        env={**environment(), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # which torch asks for
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    """Of our kernels, whose names say so."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    kernels = ["--kernel-name", "regex=inception_ext"]
    done = subprocess.run(
        [*command, *kernels, sys.executable, "-c", script(1)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
