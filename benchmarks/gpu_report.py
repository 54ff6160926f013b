"""Everything that a short session with a GPU is for, in one command: tests, correctness, times.

    python benchmarks/gpu_report.py --out report --budget 480

Needs a checkout with the built package in it (``inception_ext/_C.abi3.so``, built on any machine),
torch and torchvision; no compiler. Writes ``report.json`` and ``report.md`` after every step. Each
step is a process with a limit of its own: one that fails, hangs or runs out of time leaves what it
has found, and the next one starts. ``--device cpu`` goes through all of it without a GPU, on tiny
shapes, to see that it works.

The exit status is 1 where a result or a test is wrong, 3 where a step did not come to its end.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gpu_markdown

HERE = Path(__file__).resolve().parent
SCHEMA = "inception_ext.gpu_report"
SCHEMA_VERSION = 1
TAIL = 4000  # characters of a step's output that are kept


class Step(NamedTuple):
    """A step and the most seconds that it may take: those in TESTS are pytest, the rest
    gpu_steps.py."""

    name: str
    limit: float


# In the order of what they are worth: where time runs out, the end is missing.
STEPS = (
    Step("environment", 40),
    Step("correctness", 110),
    Step("network", 120),
    Step("kernels", 60),
    Step("modules", 80),
    Step("tests", 90),
    Step("training", 120),
    Step("compile", 120),
    Step("training-compile", 240),
    Step("slow-tests", 240),
    Step("autotune", 300),
)
TESTS = {"tests": "cuda and not slow", "slow-tests": "cuda and slow"}  # what pytest selects
SPARE = 5.0  # s: kept back for writing the report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all of it")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.budget - SPARE
    report: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "steps": []}
    for step in STEPS:
        if step.name not in args.steps:
            continue
        seconds = min(step.limit, end - time.monotonic())
        print(f"== {step.name}: at most {max(seconds, 0):.0f} s", flush=True)
        found = run(step.name, args.device, args.out, seconds)
        report["steps"].append(found)
        write(report, args.out)
        print(f"   {found['status']} after {found['seconds']} s", flush=True)
    print(f"wrote {args.out / 'report.json'} and report.md")
    return exit_status(report)


def run(name: str, device: str, out: Path, seconds: float) -> dict[str, Any]:
    """One step: ``name``, ``status`` (ok, failed, stopped, no time), ``seconds``, ``findings``."""
    if seconds < 1:
        return {"name": name, "status": "no time", "seconds": 0.0, "findings": []}
    lines = out / f"{name}.jsonl"
    lines.unlink(missing_ok=True)
    start = time.monotonic()
    try:
        command = tests(name, device) if name in TESTS else step(name, device, lines)
        code, output = limited(command, seconds)
    except OSError as error:
        code, output = -1, str(error)
    findings = [*test_findings(output)] if name in TESTS else read_lines(lines)
    lines.unlink(missing_ok=True)
    status = "stopped" if code is None else "ok" if code == 0 else "failed"
    if name in TESTS and code == 5:  # no test is marked so
        status = "ok"
    found = {"name": name, "status": status, "seconds": round(time.monotonic() - start, 1)}
    if status != "ok":
        found |= {"exit_status": code, "output": without_paths(output[-TAIL:])}
    return {**found, "findings": findings}


def step(name: str, device: str, lines: Path) -> list[str]:
    program = str(HERE / "gpu_steps.py")
    return [sys.executable, program, name, "--device", device, "--lines", str(lines)]


def tests(name: str, device: str) -> list[str]:
    """The tests that need a GPU; where there is none, only how they are skipped."""
    where = "tests/cuda" if device == "cpu" else "tests"
    options = ["-m", TESTS[name], "-v", "--tb=short", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", where, *options]


def limited(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status (None: stopped when the time was over) and output, both streams in one."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what the step starts is stopped with it
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        return None, stop(process)
    except BaseException:
        stop(process)
        raise


def stop(process: "subprocess.Popen[str]") -> str:
    """Ends a step and its children; returns its output. One that the driver holds is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=10)
        return output
    except (ProcessLookupError, subprocess.TimeoutExpired) as error:
        held = getattr(error, "stdout", None) or b""
        return held.decode(errors="replace") if isinstance(held, bytes) else held


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Findings written so far; a last line that was cut off is left out."""
    findings = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            findings.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return findings


def test_findings(output: str) -> list[dict[str, Any]]:
    """What ``pytest -v`` printed: how many tests passed, and the names of those that did not."""
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    if not outcomes:
        return []
    count = {word: sum(outcome == word for _, outcome in outcomes) for _, word in outcomes}
    names = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return [{"tests": {"count": count, "not_passed": names}}]


def without_paths(text: str) -> str:
    """Output without the places of this machine."""
    home = [(str(HERE.parent) + os.sep, ""), (sys.prefix, "python"), (str(Path.home()), "~")]
    for path, short in home:
        text = text.replace(path, short)
    return text


def write(report: dict[str, Any], out: Path) -> None:
    """JSON and markdown, each whole at any time."""
    texts: tuple[tuple[str, Callable[[], str]], ...] = (
        ("report.json", lambda: json.dumps(report, indent=1) + "\n"),
        ("report.md", lambda: gpu_markdown.render(report)),
    )
    for name, text in texts:
        draft = out / f"{name}.part"
        draft.write_text(text(), encoding="utf-8")
        draft.replace(out / name)


def exit_status(report: dict[str, Any]) -> int:
    wrong = gpu_markdown.wrong(report)
    for text in wrong:
        print(f"wrong: {text}", file=sys.stderr)
    if wrong:
        return 1
    return 0 if all(found["status"] == "ok" for found in report["steps"]) else 3


if __name__ == "__main__":
    sys.exit(main())
