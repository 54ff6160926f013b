"""Names in profiles: every op, the frozen network, and nothing to pay where nobody looks."""

import os
import subprocess
import sys

import pytest
import torch
from fast_path import CALLS, op_calls, op_of

import inception_ext
from inception_ext import _profiling


def profiled(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("name", CALLS)
def test_every_op_has_a_name(name):
    op = op_of(name)
    arguments = op_calls()[name]
    assert f"inception_ext::{op._schema.name.partition('::')[2]}" in profiled(
        lambda: op(*arguments)
    )


def test_an_engine_has_a_name_and_its_training_twin_its_nodes():
    model = inception_ext.googlenet(num_classes=10, aux_logits=False, init_weights=False)
    engine = inception_ext.freeze(model.eval())
    x = torch.randn(1, 3, 32, 32)
    engine(x)
    assert "inception_ext::engine" in profiled(lambda: engine(x))
    x = torch.randn(2, 3, 64, 64)
    names = profiled(lambda: model.train()(x).sum().backward())
    assert {"inception_ext::inception_forward", "inception_ext::inception_backward"} <= names
    assert "InceptionBackward" in names  # autograd's own name for the node


def test_a_region_is_nothing_without_a_profiler():
    assert _profiling.region("a") is _profiling.region("b")


def test_nvtx_ranges(monkeypatch):
    pushed = []
    monkeypatch.setattr(_profiling, "_nvtx", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: pushed.append(text))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: pushed.append("end"))
    with _profiling.region("graph"):
        pass
    assert pushed == ["inception_ext::graph", "end"]


def test_nvtx_is_asked_for_by_a_variable():
    program = "from inception_ext import _profiling; print(_profiling._nvtx)"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "INCEPTION_EXT_NVTX": value},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for value in ("1", "0")
    ]
    assert outputs == ["True", "False"]
