"""``python -m benchmarks`` and what is made of its results: comparison, reports, documentation."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import inception_ext

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def row(name, median, **more):
    times = {"median": median, "p20": 0.98 * median, "p80": 1.02 * median}
    facts = {"status": "ok", "reason": None, "error": 1e-6, "speedup": round(10 / median, 3)}
    return {"name": name, **facts, "ms_per_image": times, "samples": 30, **more}


def result(ours=5.0, eager=10.0, **more):
    """A result file with everything that a reader may meet."""
    missing = {"name": "tensorrt", "status": "missing", "reason": "not installed", "error": None}
    head = {"schema": "inception_ext.benchmarks", "schema_version": 1, "date": "2026-01-02T00:00"}
    scenario = {"kind": "inference", "device": "cpu", "l2": None, "dtype": "fp32", "batch": 8}
    scenario |= {"size": 224, "rounds": 3, "others_cores": 0.0, "baseline": "eager channels_last"}
    scenario |= {"floor_ms_per_image": 2.0, "floor_of": "all fused, here"}
    rows = [
        row("ours freeze", ours, share_of_floor=2 / ours, peak_mb_per_image=1.5),
        row("eager channels_last", eager, share_of_floor=2 / eager),
        missing,
    ]
    along = [
        {**scenario, "batch": n, "axis": "batch", "threads": 2, "contestants": rows[:2]}
        for n in (1, 8)
    ]
    return {
        **head,
        "commit": "abc",
        "machine": {"cpu": "CPU", "isa": "AVX2"},
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "scenarios": [{**scenario, "contestants": rows}, *along],
        **more,
    }


@pytest.fixture
def file(tmp_path):
    def write(content, name="result.json"):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return path

    return write


# The command.


def test_every_scenario_is_listed():
    command = [sys.executable, "-m", "benchmarks", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    wanted = "I1 I8 I32 I128 I256 T32 T128 T256 TM stem 3a 3b 4a 4b 4c 4d 4e 5a 5b bvlc T16"
    assert {*wanted.split()} <= {*names}
    assert {"growth-batch", "growth-large-batch", "growth-size", "growth-threads"} <= {*names}


def test_a_quick_run(load, monkeypatch, tmp_path, capsys):
    main = _main(monkeypatch)
    path = tmp_path / "folder" / "result.json"
    argv = ["3a", "overhead", "--quick", "--threads", "1", "--dtype", "fp32", "--json", str(path)]
    assert main.main(argv) == 0
    found = load("results").load(path)
    assert found["quick"] and found["commit"] and found["machine"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert [s["kind"] for s in found["scenarios"]] == [
        "inception3a",
        "training inception3a",
        "overhead",
    ]
    forward, training, overhead = found["scenarios"]
    by_name = {r["name"]: r for r in forward["contestants"]}
    assert by_name["ours eval"]["status"] == "ok"
    assert by_name["ours eval"]["share_of_floor"] > 0
    assert by_name["compile"]["status"] == "missing"  # named, with its reason
    assert "--quick" in by_name["compile"]["reason"]
    ours = next(r for r in training["contestants"] if r["name"] == "ours")
    assert ours["saved_mb_per_image"] > 0
    added = {r["name"]: r.get("added_us") for r in overhead["contestants"]}
    assert added["functional.max_pool"] > 0
    assert "[1/2" in capsys.readouterr().out


def _main(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = BENCHMARKS / "__main__.py"
    spec = importlib.util.spec_from_file_location("benchmarks_main", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("wrong", [["I7"], ["--rounds", "0"], ["--dtype", "fp8"]])
def test_bad_options(monkeypatch, wrong):
    with pytest.raises(SystemExit) as stop:
        _main(monkeypatch).parse(wrong)
    assert stop.value.code == 2


# Result files.


@pytest.mark.parametrize(
    "content",
    [[], {"schema": "x"}, {"schema": "inception_ext.benchmarks", "schema_version": 99}],
)
def test_other_files_are_refused(load, file, content):
    with pytest.raises(ValueError, match="expected"):
        load("results").load(file(content))


def test_a_gpu_report_reads_like_the_others(load, file):
    plain = result()
    scenario = plain.pop("scenarios")[0]
    kernel = {"kernel": {"name": "conv_group", "batch": 8, "dtype": "fp16", "index": 3}}
    head = {k: plain.pop(k) for k in ("schema", "schema_version")}
    findings = [{"environment": plain}, {"scenario": scenario}, kernel]
    report = {**head, "schema": "inception_ext.gpu_report", "steps": [{"findings": findings}]}
    found = load("results").load(file(report))
    assert found["scenarios"] == [scenario]
    assert found["kernels"] == [kernel["kernel"]]
    assert found["commit"] == "abc"


def test_committed_results_can_be_read(load):
    results = load("results")
    # Those of scenarios: builds, counters and the recipe are written otherwise.
    others = ("build-", "counters-", "recipe-")
    files = [path for path in results.FOLDER.glob("*.json") if not path.name.startswith(others)]
    assert files
    for path in files:
        found = results.load(path)
        assert found["commit"] and found["versions"]["torch"]
        assert results.wrong(found["scenarios"]) == []


# compare.py


def test_compare_finds_what_is_slower(load, file, capsys):
    compare = load("compare")
    old, new = file(result(5.0), "old.json"), file(result(5.5), "new.json")
    assert compare.main([str(old), str(old)]) == 0
    assert compare.main([str(old), str(new)]) == 1
    assert "1.100" in capsys.readouterr().out
    assert compare.main([str(new), str(old)]) == 0
    assert "faster" in capsys.readouterr().out
    assert compare.main([str(old), str(new), "--threshold", "0.2"]) == 0
    assert compare.main([str(old), str(new), "--only", "eager"]) == 0


def test_compare_knows_noise(load):
    Ratio = load("compare").Ratio
    assert Ratio("x", 1, 1.1, 1.1, 0.98, 1.2).verdict(0.05) == ""
    assert Ratio("x", 1, 1.1, 1.1, 1.01, 1.2).verdict(0.05) == "slower"
    assert Ratio("x", 1, 0.9, 0.9, 0.8, 0.99).verdict(0.05) == "faster"
    assert Ratio("x", 1, 0.9, 0.9, 0.8, 1.01).verdict(0.05) == ""


def test_compare_across_machines(load, file, capsys):
    compare = load("compare")
    old, new = file(result(5, 10), "old.json"), file(result(10, 20), "new.json")
    assert compare.main([str(old), str(new)]) == 1
    assert compare.main([str(old), str(new), "--relative"]) == 0
    with pytest.raises(SystemExit):
        compare.main([str(old), str(file({"schema": 1}, "none.json"))])
    assert "none.json: expected" in capsys.readouterr().err


# report.py and the documentation


def test_a_report(load, file, tmp_path):
    report = load("report")
    assert report.main([str(file(result())), "--out", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.md", "growth-batch.png", "inference-fp32.png"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **ours freeze** | 5.00 | 4.90 | 5.10 | 2.00x | 1.0e-06 | 40 % | 1.5 |" in text
    assert "| tensorrt | missing: not installed |" in text
    assert "![growth-batch](growth-batch.png)" in text


def test_the_documentation_is_fresh(load):
    """``python benchmarks/report.py --docs`` writes what this finds missing."""
    assert load("report").stale() == []


def test_stale_pages_are_found_and_filled(load, monkeypatch, tmp_path):
    blocks, report = load("blocks"), load("report")
    monkeypatch.setattr(blocks, "BLOCKS", {"one": lambda: "fresh", "two": lambda: 1 / 0})
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text("a\n<!-- generated: one -->\nold\n<!-- end -->\nb\n")
    assert report.stale(tmp_path) == [Path("docs/page.md")]
    page.write_text(blocks.filled(page.read_text()))
    assert page.read_text() == "a\n<!-- generated: one -->\nfresh\n<!-- end -->\nb\n"
    assert report.stale(tmp_path) == []


def test_counters_by_batch_and_dtype(load, tmp_path):
    counts = load("counts")
    found = {"batch": 8, "dtype": "float16", "launches": 24, "bytes_touched_per_image": 9e6}
    found |= {"bytes_issued_per_image": 4e7, "useful_mac_share": 0.95, "bank_conflicts": 0}
    (tmp_path / "counters-8.json").write_text(json.dumps(found))
    (tmp_path / "counters-other.json").write_text("{}")
    assert counts.for_batch(8, "fp16", tmp_path)["launches"] == 24
    assert counts.for_batch(1, "fp16", tmp_path) is None
    assert counts.row(found) == ["float16, batch 8", "24", "9.00", "40.0", "95.0 %", "0"]
    text = load("markdown").counters_text(found)
    assert text.startswith("24 launches, 9.00 MB touched")


# Devices and contestants.


def test_memory_on_the_host(load):
    devices = load("devices")
    x = torch.ones(1 << 18)
    assert devices.Host().peak_bytes(lambda: (x + 1, x + 2)) >= 2 * x.nbytes
    assert devices.Host().peak_bytes(lambda: None) is None
    weight = torch.ones(1 << 18, requires_grad=True)
    assert devices.saved_bytes(lambda: x * weight) == x.nbytes  # the parameter does not count
    y = x.clone().requires_grad_()
    assert devices.saved_bytes(lambda: (y * 2).exp()) == x.nbytes


def test_the_gpus_timer(load, monkeypatch):
    """The calls that it makes of torch.cuda, on a stand-in for a device."""
    devices = load("devices")
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 1.5  # ms

    empty = torch.empty
    properties = SimpleNamespace(L2_cache_size=1 << 10)
    for name, stand_in in {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "Event": Event,
        "synchronize": lambda: log.append("device"),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 140,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the timer turns it on
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(8, dtype=dtype))
    gpu = devices.Cuda()
    gpu._evict = SimpleNamespace(zero_=lambda: log.append("evict"))
    assert gpu.seconds(lambda: log.append("call")) == 0.0015
    assert log == ["record", "call", "record", "synchronize"]
    log.clear()
    gpu.seconds(lambda: log.append("call"), cold=True)
    assert log == ["evict", "record", "call", "record", "synchronize"]
    assert gpu.peak_bytes(lambda: None) == 40


def test_graphs_need_a_gpu(load):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(NotImplementedError, match="GPU"):
        load("devices").captured(lambda: None)


def test_the_folded_network_is_the_network(load):
    """cuDNN's contestants, with PyTorch's convolution in the place of cuDNN's."""
    folded = load("folded")
    torch.manual_seed(0)
    model = inception_ext.googlenet(num_classes=10, aux_logits=False, init_weights=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.running_mean, -1, 1)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        network = folded.Folded(model, torch.float32, folded.plain_relu())
        torch.testing.assert_close(network(x), model(x), rtol=1e-3, atol=1e-4)


def test_gpu_contestants_on_the_cpu(load, monkeypatch):
    """Everything but the capture itself, which is played by a call."""
    peers_cuda, workload = load("peers_cuda"), load("workload")

    def played(call):
        result = call()

        def replay():
            result.copy_(call())

        return replay, result

    monkeypatch.setattr(peers_cuda, "captured", played)
    weights = workload.seeded_weights(heads=False)
    work = workload.inference_workload(weights, 1, size=33, inputs=2, checked=2)
    names = ("ours freeze, CUDA graph", "eager CUDA graph", "eager autocast")
    for name in names:
        call = peers_cuda.INFERENCE[name](work, torch.float32)
        with torch.inference_mode():
            for i in (1, 0, 1):
                torch.testing.assert_close(
                    call(i).double(), work.references[i], rtol=1e-3, atol=1e-3
                )
    for name in ("tensorrt", "cudnn-frontend, CUDA graph", "openvino", "onnxruntime"):
        with pytest.raises((ImportError, NotImplementedError)):
            peers_cuda.INFERENCE[name](work, torch.float32)
