"""What each Python layer costs a call: gate, op, autograd.Function, module, frozen network.

    python -m benchmarks overhead

Tensors are so small that nearly all of a call is overhead. It is the host's time, the same on a
GPU, where it matters as long as the device waits for the host; and it is the calling thread's own
time, so that other programs disturb it little.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import scenario
import torch
import torch.nn.functional as F
from timing import Result, Summary, interleave, summarize

import inception_ext
from inception_ext import functional
from inception_ext._layers import max_pool
from inception_ext._profiling import region

__all__ = ["LAYERS", "measure"]

CALLS = 50  # a sample: one alone is too short for the clock

# Each with what it is on top of; the difference is what the layer costs.
LAYERS: Mapping[str, str | None] = {
    "an empty Python function": None,
    "torch.add": "an empty Python function",
    "gate: why_pool_reference": None,
    "op: max_pool_forward": None,
    "functional.max_pool": "op: max_pool_forward",
    "functional.max_pool, autograd": "functional.max_pool",
    "modules.max_pool, autograd": "functional.max_pool, autograd",
    "F.max_pool2d": None,
    "F.max_pool2d, autograd": "F.max_pool2d",
    "op: inception_forward": None,
    "functional.inception": "op: inception_forward",
    "Inception, eval": "functional.inception",
    "Inception, train": "Inception, eval",
    "Inception, plain PyTorch, eval": None,
    "Inception, plain PyTorch, train": "Inception, plain PyTorch, eval",
    "a region without a profiler": None,
}


def _calls() -> dict[str, Callable[[], Any]]:
    ops = torch.ops.inception_ext
    x = torch.randn(1, 8, 4, 4).to(memory_format=torch.channels_last)
    y = x.clone(memory_format=torch.preserve_format).requires_grad_()
    window = ([3, 3], [2, 2], [0, 0], False)
    pool = torch.nn.MaxPool2d(3, 2)
    block = inception_ext.Inception(8, 8, 8, 8, 8, 8, 8).to(memory_format=torch.channels_last)
    trained = inception_ext.Inception(8, 8, 8, 8, 8, 8, 8).to(memory_format=torch.channels_last)
    block.eval().requires_grad_(False)
    convs = [m for m in block.modules() if isinstance(m, inception_ext.BasicConv2d)]
    lists = [
        [conv.conv.weight for conv in convs],
        *(
            [getattr(conv.bn, name) for conv in convs]
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
    ]
    settings = (False, 0.1, 1e-3)

    def plain(module: torch.nn.Module, x: torch.Tensor) -> Any:
        with functional.use_kernels(False):
            return module(x)

    return {
        "an empty Python function": lambda: None,
        "torch.add": lambda: torch.add(x, x),
        "gate: why_pool_reference": lambda: functional.why_pool_reference(x, 3, 2),
        "op: max_pool_forward": lambda: ops.max_pool_forward(x, *window, False),
        "functional.max_pool": lambda: functional.max_pool(x, 3, 2),
        "functional.max_pool, autograd": lambda: functional.max_pool(y, 3, 2),
        "modules.max_pool, autograd": lambda: max_pool(pool, y),
        "F.max_pool2d": lambda: F.max_pool2d(x, 3, 2),
        "F.max_pool2d, autograd": lambda: F.max_pool2d(y, 3, 2),
        "op: inception_forward": lambda: ops.inception_forward(x, *lists, *settings, False),
        "functional.inception": lambda: functional.inception(x, *lists, *settings),
        "Inception, eval": lambda: block(x),
        "Inception, train": lambda: trained(y),
        "Inception, plain PyTorch, eval": lambda: plain(block, x),
        "Inception, plain PyTorch, train": lambda: plain(trained, y),
        "a region without a profiler": _region,
    }


def _region() -> None:
    with region("a name"):
        pass


def measure(rounds: int = 40) -> dict[str, Any]:
    """All of LAYERS in turns, as a scenario whose milliseconds an image are those of a call."""
    calls = _calls()

    def timer(call: Callable[[], Any]) -> float:
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        return (time.thread_time() - start) / CALLS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waking the others would be most of it
    try:
        timing = interleave(
            {name: lambda i, call=call: call() for name, call in calls.items()},
            rounds=rounds,
            timer=timer,
            samples=1,
            progress=lambda done: scenario.say(f"overhead: round {done} of {rounds}"),
        )
    finally:
        torch.set_num_threads(threads)
    scenario.say("")
    summaries = {name: summarize(samples) for name, samples in timing.samples.items()}
    return {
        "kind": "overhead",
        "device": "cpu",
        "l2": None,
        "dtype": "fp32",
        "batch": 1,
        "size": 4,
        "rounds": rounds,
        "others_cores": timing.others_cores,
        "repeated_rounds": timing.repeated,
        "baseline": "torch.add",
        "contestants": [
            _row(name, summaries[name], summaries.get(below or ""))
            for name, below in LAYERS.items()
        ],
    }


def _row(name: str, summary: Summary, below: Summary | None) -> dict[str, Any]:
    row = scenario.row(Result(name, "ok", summary=summary), 1, None, None)
    row["over"] = LAYERS[name]
    if below is not None:
        row["added_us"] = round((summary.median - below.median) * 1e6, 2)
    return row
