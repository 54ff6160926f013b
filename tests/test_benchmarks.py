"""The benchmarks' helper, and a small run of the CPU benchmark."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inception_ext

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("timing")


class Clock:
    """A clock that only calls advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, seconds: float):
        def call(i: int) -> None:
            self.calls.append((name, i))
            self.now += seconds

        return call


def test_every_round_gives_everyone_one_turn(timing):
    clock = Clock()
    calls = {name: clock.contestant(name, 1.0) for name in "abcd"}
    samples = timing.interleave(calls, rounds=10, warmup=1, inputs=3, clock=clock).samples
    assert list(samples) == list("abcd")
    assert all(times == [1.0] * 10 for times in samples.values())
    order = [name for name, _ in clock.calls[4:]]  # after the warm-up
    rounds = [order[i : i + 4] for i in range(0, len(order), 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 3  # shuffled
    inputs = [i for name, i in clock.calls if name == "b"]
    assert inputs == [n % 3 for n in range(11)]  # rotated


def test_short_calls_get_an_untimed_one_and_several_samples(timing):
    clock = Clock()
    calls = {"short": clock.contestant("short", 0.01), "long": clock.contestant("long", 0.2)}
    samples = timing.interleave(calls, rounds=3, warmup=2, clock=clock).samples
    assert len(samples["short"]) == 15
    assert len(samples["long"]) == 3
    assert sum(name == "short" for name, _ in clock.calls) == 2 + 3 * (1 + 5)
    assert sum(name == "long" for name, _ in clock.calls) == 2 + 3


def test_progress_counts_rounds(timing):
    clock = Clock()
    seen: list[int] = []
    timing.interleave(
        {"a": clock.contestant("a", 1.0)}, rounds=3, clock=clock, progress=seen.append
    )
    assert seen == [1, 2, 3]


def test_disturbed_rounds_run_again_while_patience_lasts(timing):
    clock = Clock()
    company = iter([0.0, 0.5, 0.05, 1.0, 1.0, 1.0, 0.0])

    class Observer:
        def cores(self):
            return next(company)

    result = timing.interleave(
        {"a": clock.contestant("a", 1.0)},
        rounds=4,
        warmup=1,
        patience=2.5,
        company=Observer,
        clock=clock,
    )
    # Kept: 0.0, 0.05; thrown away: 0.5, 1.0 and 1.0, which ends the patience; kept: 1.0 ...
    assert result.repeated == 3
    assert len(result.samples["a"]) == 4
    assert result.others_cores == pytest.approx((0.0 + 0.05 + 1.0 + 0.0) / 4, abs=0.006)


def test_summary(timing):
    summary = timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert summary == timing.Summary(samples=6, median=3.5, p20=2.0, p80=5.0)
    assert timing.summarize([2.0]) == timing.Summary(1, 2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="at least one"):
        timing.summarize([])


def test_relative_error(timing):
    want = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert timing.relative_error(torch.tensor([3.0, -4.0]), want) == 0
    assert timing.relative_error(torch.tensor([4.0, -4.0]), want) == pytest.approx(0.2)
    assert timing.relative_error([want + 1, want], [want, want]) == pytest.approx(2**0.5 / 5)
    assert math.isnan(timing.relative_error(torch.tensor([float("nan"), 0.0]), want))
    with pytest.raises(ValueError, match=r"output is \[1\], the reference \[2\]"):
        timing.relative_error(torch.ones(1), want)


def test_errors_over_inputs(timing):
    errors = [[3.0, 1.0], [4.0, 7.0]]  # two inputs, two results
    assert timing.largest(errors) == 7
    assert timing.together(errors) == pytest.approx(25**0.5)
    assert timing.together([[3.0, 0.0], [4.0, 0.0]]) == pytest.approx(12.5**0.5)
    for judge in (timing.largest, timing.together):
        assert math.isnan(judge([[1.0, 2.0], [float("nan"), 1.0]]))


def test_contest_checks_then_times_and_drops_nobody(timing):
    want = [torch.ones(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)]
    buffer = torch.empty(2)

    def right(i):
        return want[i].float()

    def off(i):
        return want[i].float() * 1.5

    def same_buffer(i):
        return buffer.copy_(want[i])

    def not_there():
        raise ImportError("No module named 'peer'\nand more")

    outcome = timing.contest(
        [
            timing.Candidate("right", lambda: right),
            timing.Candidate("off", lambda: off),
            timing.Candidate("same buffer", lambda: same_buffer),
            timing.Candidate("not there", not_there),
        ],
        want,
        rounds=2,
        limit=lambda errors: 2 * errors["right"] + 0.1,
    )
    by_name = {result.name: result for result in outcome.results}
    assert outcome.others_cores is None or outcome.others_cores >= 0
    assert [result.status for result in outcome.results] == ["ok", "wrong", "wrong", "missing"]
    assert by_name["right"].error == 0
    assert by_name["right"].summary.samples >= 2
    assert by_name["off"].error == pytest.approx(0.5)
    assert by_name["off"].reason == "error 5.0e-01 is above 1.0e-01"
    assert by_name["same buffer"].error == pytest.approx(1.0)
    assert by_name["not there"].reason == "ImportError: No module named 'peer'"
    assert by_name["not there"].summary is None


def test_nan_is_wrong(timing):
    want = [torch.ones(1, dtype=torch.float64)]
    candidate = timing.Candidate("nan", lambda: lambda i: torch.tensor([float("nan")]))
    (result,) = timing.contest([candidate], want, rounds=1, limit=lambda errors: 1.0).results
    assert result.status == "wrong"


def test_bench_cpu_quick(tmp_path):
    target = tmp_path / "results" / "cpu.json"
    root = str(Path(inception_ext.__file__).parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, str(BENCHMARKS / "bench_cpu.py"), "--quick", "--only", "ours,eager"]
    done = subprocess.run(
        [*command, "--json", str(target)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert result["schema"] == "inception_ext.bench_cpu"
    assert result["schema_version"] == 1
    assert result["threads"] == 1
    assert {"date", "commit", "machine", "versions"} <= set(result)
    kinds = [(s["kind"], s["dtype"], s["batch"]) for s in result["scenarios"]]
    assert kinds == [
        ("inference", "fp32", 2),
        ("inference", "bf16", 2),
        ("training check", "fp32", 2),
    ]
    for scenario in result["scenarios"]:
        assert "others_cores" in scenario
        names = [row["name"] for row in scenario["contestants"]]
        assert scenario["baseline"] in names
        assert any(name.startswith("ours") for name in names)
        for row in scenario["contestants"]:
            assert row["status"] == "ok", row
            times = row["ms_per_image"]
            assert 0 < times["p20"] <= times["median"] <= times["p80"]
            assert row["speedup"] > 0
    assert "ms/image" in done.stdout
    assert str(BENCHMARKS) not in target.read_text()


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--rounds", "0"], ["--dtype", "fp8"]])
def test_bench_cpu_refuses_bad_options(monkeypatch, wrong):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench_cpu = importlib.import_module("bench_cpu")
    with pytest.raises(SystemExit) as stop:
        bench_cpu.parse(wrong)
    assert stop.value.code == 2
