"""benchmarks/gpu_report.py without a GPU: that steps may fail, hang or run out of time, and that
what they do runs on tiny shapes."""

import dataclasses
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_devices import needs_emulator

import inception_ext
from inception_ext.testing import emulated

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def module(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture
def gpu_report(monkeypatch):
    return module(monkeypatch, "gpu_report")


STEPS = {
    "environment": "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'a': 1}) + '\\n')",
    "correctness": "import sys; open(sys.argv[1], 'w').write('{\"b\": 2}\\n{\"c')\n"
    "sys.exit('gone')",
    "network": "import sys, time, subprocess\n"
    "open(sys.argv[1], 'w').write('{\"d\": 3}\\n'); print('waiting', flush=True)\n"
    "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "kernels": "raise SystemExit('never gets a turn')",
}


def test_each_step_keeps_what_it_has(gpu_report, monkeypatch, tmp_path):
    monkeypatch.setattr(
        gpu_report,
        "step",
        lambda name, device, lines: [sys.executable, "-c", STEPS[name], str(lines)],
    )
    monkeypatch.setattr(gpu_report, "SPARE", 0.0)
    start = time.monotonic()
    status = gpu_report.main(["--out", str(tmp_path / "new"), "--budget", "4", "--steps", *STEPS])
    assert time.monotonic() - start < 8  # the children of a step that hangs end with it
    assert status == 3
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert [step["status"] for step in steps.values()] == ["ok", "failed", "stopped", "no time"]
    assert steps["environment"]["findings"] == [{"a": 1}]
    assert steps["correctness"]["findings"] == [{"b": 2}]  # the line that was cut off is not
    assert steps["correctness"]["exit_status"] == 1
    assert "gone" in steps["correctness"]["output"]
    assert steps["network"]["findings"] == [{"d": 3}]
    assert "waiting" in steps["network"]["output"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "report.json",
        "report.md",
    ]
    assert "| network | stopped |" in (tmp_path / "new" / "report.md").read_text()


def test_tests_are_counted_from_what_pytest_prints(gpu_report):
    output = """
tests/a.py::test_x[1-cuda] PASSED                       [ 33%]
tests/a.py::test_y SKIPPED (no GPU)                     [ 66%]
tests/b.py::test_z[a b] FAILED                          [100%]
"""
    (finding,) = gpu_report.test_findings(output)
    assert finding["tests"] == {
        "count": {"PASSED": 1, "SKIPPED": 1, "FAILED": 1},
        "not_passed": ["tests/b.py::test_z[a b]"],
    }
    assert gpu_report.test_findings("No module named pytest") == []


def test_wrong_results_are_named(gpu_report, monkeypatch):
    check = {"variant": "bvlc", "dtype": "fp16", "batch": 1, "size": [15, 33], "images": "u"}
    row = {"name": "ours freeze", "status": "wrong", "reason": "error", "error": 1.0}
    findings = [
        {"check": {**check, "ok": True, "wrong": []}},
        {"check": {**check, "ok": False, "wrong": [{"name": "lrn 64x7x7 -> 64"}]}},
        {"check": {**check, "ok": False, "raised": "RuntimeError: illegal"}},
        {"scenario": {"kind": "inference", "batch": 8, "contestants": [row]}},
        {"kernel": {"name": "conv_group", "batch": 8, "error": "RuntimeError: no"}},
        {"tests": {"count": {}, "not_passed": ["tests/b.py::test_z"]}},
    ]
    report = {"steps": [{"status": "ok", "findings": findings}]}
    assert gpu_report.gpu_markdown.wrong(report) == [
        "bvlc fp16 1 x 15 x 33 u: lrn 64x7x7 -> 64",
        "bvlc fp16 1 x 15 x 33 u: RuntimeError: illegal",
        "inference, batch 8, ours freeze",
        "conv_group, batch 8: RuntimeError: no",
        "tests/b.py::test_z",
    ]
    assert gpu_report.exit_status(report) == 1


@pytest.fixture
def job(monkeypatch):
    """A job of a step, as on a machine without a GPU but smaller still."""
    steps = module(monkeypatch, "gpu_steps")
    whole = steps.Job.on("cpu")
    return dataclasses.replace(whole, batches=(1,), size=33, parts=("stem", "inception5b"))


@pytest.mark.parametrize("name", ["environment", "correctness", "kernels", "modules"])
def test_steps_run(monkeypatch, job, name):
    steps = module(monkeypatch, "gpu_steps")
    gpu_markdown = module(monkeypatch, "gpu_markdown")
    findings = json.loads(json.dumps(list(steps.STEPS[name](job))))
    report = {"steps": [{"name": name, "status": "ok", "seconds": 1.0, "findings": findings}]}
    assert gpu_markdown.wrong(report) == []
    text = gpu_markdown.render(report)
    if name == "environment":
        assert findings[1]["roof"]["flops"] > 1e8
        assert "torch" in text
    elif name == "correctness":
        assert [finding["check"]["ok"] for finding in findings] == [True] * 4
        assert all(0 < finding["check"]["error"] < 1e-4 for finding in findings)
    elif name == "kernels":
        names = [finding["kernel"]["name"] for finding in findings]
        assert names[-4:] == [
            *("lrn 16x7x7, forward", "lrn 16x7x7, backward"),
            *("aux_pool 16x7x7, forward", "aux_pool 16x7x7, backward"),
        ]
        assert all(finding["kernel"]["warm_us"]["median"] > 0 for finding in findings)
    elif name == "modules":
        rows = {row["name"]: row for row in findings[1]["scenario"]["contestants"]}
        assert findings[1]["scenario"]["kind"] == "inception5b"
        assert rows["ours eval"]["status"] == rows["eager channels_last"]["status"] == "ok"
        assert "CUDA graphs need a GPU" in rows["eager CUDA graph"]["reason"]  # named, not dropped


def test_training_in_parts(monkeypatch, job):
    """Forward, backward, both, and with the optimizer, in one table beside their memory."""
    steps = module(monkeypatch, "gpu_steps")
    gpu_markdown = module(monkeypatch, "gpu_markdown")
    job = dataclasses.replace(job, size=64)
    for name, value in job.state_dict(True).items():
        if name.endswith("bn.bias"):  # rounding errors decide no ReLU
            value.copy_(torch.where(torch.arange(len(value)) % 3 == 0, -4.0, 4.0))
    findings = json.loads(json.dumps(list(steps.STEPS["training"](job))))
    report = {"steps": [{"name": "training", "status": "ok", "seconds": 1.0, "findings": findings}]}
    assert gpu_markdown.wrong(report) == []
    kinds = [finding["scenario"]["kind"] for finding in findings]
    forward, backward = "training forward", "training backward"
    assert kinds == ["training step", forward, backward, "training step with optimizer"]
    for finding in findings:
        rows = {row["name"]: row for row in finding["scenario"]["contestants"]}
        assert rows["ours"]["status"] == rows["eager channels_last"]["status"] == "ok"
        missing = {name for name, row in rows.items() if row["status"] == "missing"}
        graphs = {"ours, CUDA graph", "eager CUDA graph"}
        assert missing == (set() if finding["scenario"]["kind"] == backward else graphs)
    text = gpu_markdown.render(report)
    (ours,) = (line for line in text.splitlines() if line.startswith("| ours |"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert len(cells) == 8 and all(float(cell.rstrip("x")) > 0 for cell in cells[1:])


@needs_emulator
def test_launches_are_caught_checked_and_counted(monkeypatch):
    launches = module(monkeypatch, "launches")
    torch.manual_seed(0)
    x = torch.randn(2, 16, 9, 9).to(torch.float16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 16).to(torch.float16)
    y = torch.empty(2, 24, 9, 9, dtype=torch.float16).to(memory_format=torch.channels_last)
    pooled = torch.empty(2, 24, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    ops = torch.ops.inception_ext_emulated
    with emulated(), launches.Catch(checking=True) as caught:
        one = ([x, x], [weight, weight], [torch.zeros(24)] * 2, [1, 1] * 2, [1, 1] * 2, [0, 0] * 2)
        halves = [y[:, :8], y[:, 8:], torch.empty_like(y)]
        ops.conv_group(*one, [False, True], [True, True], [2, 1], True, None, halves)
        ops.max_pool_out(y, [3, 3], [2, 2], [0, 0], False, pooled)
    first, second = caught.launches
    assert launches.describe(first) == "conv_group 16x9x9, 16x9x9 -> 8, 16, 24"
    assert launches.describe(second) == "max_pool_out 24x9x9 -> 24"
    assert launches.flops(first) == 2 * (2 * 2 * 81 * 24 * 16)
    assert launches.flops(second) == 0
    pixels = 2 * 81 * 2
    assert launches.touched_bytes(first) == pixels * (16 + 24 + 24) + 24 * 16 * 2 + 24 * 4
    assert [check.ok for check in caught.checks] == [True, True]
    assert 0 < caught.checks[0].error <= caught.checks[0].limit < 0.01
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(y, 3, 2))

    broken = first._replace(arguments=(*first.arguments[:7], [False, True], *first.arguments[8:]))
    monkeypatch.setattr(launches.reference, "conv_group", lambda *a: [t.fill_(1) for t in a[-1]])
    with emulated():
        assert not launches.check(broken).ok


def test_nan_is_not_ok(monkeypatch):
    launches = module(monkeypatch, "launches")
    assert not launches.Check("op", float("nan"), 0.0, 1.0).ok


@needs_emulator
def test_layers_on_the_emulator(monkeypatch, job):
    """As on a GPU: right, repeatable, and moving the bytes that their floors count."""
    layers = module(monkeypatch, "gpu_layers")
    monkeypatch.setattr(layers.gpu_kernels, "times", lambda *_: {"warm_us": {"median": 1.0}})
    for layer in layers.layers(job):
        with emulated() as launches:
            found = layers._check(job, layer, "fp32", 2)
        assert found["ok"] and 0 < found["error"] <= found["limit"]
        assert len(launches) == 5  # two runs, and one that tells the gradient's shape
        with emulated():
            ways = list(layers._ways(layer, *layers._tensors(job, layer, torch.float16, 2)))
        for _, call, size in ways:
            with emulated() as launches:
                call()
            assert [launch["bytes_touched"] for launch in launches] == [size]


@needs_emulator
def test_a_frozen_network_on_the_emulator(monkeypatch, job):
    """As on a GPU: every launch is caught and right, and they do the work that floors.py counts."""
    correctness, floors = module(monkeypatch, "gpu_correctness"), module(monkeypatch, "floors")
    kernels = module(monkeypatch, "gpu_kernels")
    model = inception_ext.googlenet(aux_logits=False, init_weights=False)
    model.load_state_dict(job.state_dict(False))
    with emulated(checks=False, counting=False):
        found = correctness._case(job, model.eval(), "fp16", 1, (33, 33), "uint8 NHWC")
        monkeypatch.setattr(kernels, "times", lambda *_: {"warm_us": {"median": 1.0}})
        launches = [finding["kernel"] for finding in kernels.kernels(job)]
    assert found["ok"] and found["repeats"]
    assert found["launches"] == len(launches) == 24
    layers = floors.trace(floors.network(), 33)
    assert sum(launch["flops"] for launch in launches) == sum(layer.flops for layer in layers)
    engine = floors.total(floors.stages(layers, "engine", 4))
    # Biases stay float32 and packed rows are whole vectors: a little more than the floor's bytes.
    touched = sum(launch["bytes"] for launch in launches)
    assert 1.0 <= touched / (engine.bytes + engine.weight_bytes) < 1.02
