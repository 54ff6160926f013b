"""GoogLeNet on the CPU: inception_ext beside eager, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/bench_cpu.py --json result.json
    python benchmarks/bench_cpu.py --batch 8 --dtype fp32 --only ours,eager --no-train

Every contestant is checked against a float64 reference, then all are timed in turns in this one
process. The table shows milliseconds an image and the speed as a multiple of torchvision's eager
model in channels_last and the same dtype. A peer that cannot run is listed with its reason. The
exit status is 1 where a result of ours is wrong.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import environment
import peers
import workload
from timing import COMPANY, Candidate, Result, contest

SCHEMA = "inception_ext.bench_cpu"
SCHEMA_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NOISE = {"fp32": 1e-5, "bf16": 1e-2}  # relative error that is always right, beside 2x eager's
OURS = "ours"  # the names of our contestants start with it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="images a call, inference")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="inference")
    add("--train-batch", type=int, default=16, help="images a training step")
    add("--train-dtype", nargs="+", choices=DTYPES, default=["fp32"], help="bf16 is autocast")
    add("--no-train", action="store_true", help="leave the training step out")
    add("--rounds", type=int, help="turns of each contestant; default: more for small batches")
    add("--size", type=int, default=224, help="height and width of the images")
    add("--threads", type=int, default=torch.get_num_threads(), help="for every contestant")
    add(
        "--patience",
        type=float,
        default=0.0,
        help="seconds for each table to run rounds again that other programs disturbed",
    )
    add("--only", help="contestants whose name contains one of these, comma-separated")
    add("--quick", action="store_true", help="a small run that tries everything, for tests")
    add("--json", type=Path, metavar="FILE", help="write the result here")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.train_batch, args.size, args.rounds = [2], 2, 64, args.rounds or 2
    for name, values in (("--batch", args.batch), ("--train-batch", [args.train_batch])):
        if min(values) < 1:
            parser.error(f"{name} should be at least 1")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds should be at least 1")
    return args


def rounds_for(batch: int) -> int:
    """Turns that give about 100 samples at batch 1 and at least 20 anywhere."""
    return max(20, 50 // batch)


def error_limit(dtype: str, errors: Mapping[str, float | None]) -> float:
    """Twice the error of eager in the same dtype, plus a floor."""
    return 2 * (errors.get(peers.BASELINE) or 0.0) + NOISE[dtype]


def run_scenario(
    kind: str,
    factories: Mapping[str, peers.Factory],
    work: workload.Workload,
    dtype: str,
    rounds: int,
    patience: float,
) -> dict[str, Any]:
    """Checks and times one scenario; returns its part of the result file."""
    batch = len(work.images[0])

    def announce(text: str) -> None:
        _status(f"{kind} {dtype} batch {batch}: {text}")

    outcome = contest(
        [Candidate(name, partial(f, work, DTYPES[dtype])) for name, f in factories.items()],
        work.references,
        rounds=rounds,
        patience=patience,
        limit=partial(error_limit, dtype),
        inputs=len(work.images),
        announce=announce,
        progress=lambda done: announce(f"round {done} of {rounds}"),
    )
    _status("")
    results = outcome.results
    baseline = next((r.summary for r in results if r.name == peers.BASELINE and r.summary), None)
    return {
        "kind": kind,
        "dtype": dtype,
        "batch": batch,
        "size": work.images[0].shape[-1],
        "rounds": rounds,
        "others_cores": outcome.others_cores,
        "repeated_rounds": outcome.repeated,
        "baseline": peers.BASELINE,
        "contestants": [_row(r, batch, baseline.median if baseline else None) for r in results],
    }


def _row(result: Result, batch: int, baseline: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": result.name, "status": result.status, "reason": result.reason}
    row["error"] = result.error
    if result.summary:
        times = result.summary
        row["ms_per_image"] = {
            key: round(getattr(times, key) * 1e3 / batch, 4) for key in ("median", "p20", "p80")
        }
        row["samples"] = times.samples
        row["speedup"] = round(baseline / times.median, 3) if baseline else None
    return row


def table(scenario: Mapping[str, Any]) -> str:
    """The scenario as text, ms an image."""
    title = "{kind}, {dtype}, batch {batch}, {size} x {size}".format(**scenario)
    lines = [title, f"  {'':20}{'ms/image':>10}{'p20':>9}{'p80':>9}{'speed':>8}{'error':>10}"]
    for row in scenario["contestants"]:
        if "ms_per_image" not in row:
            lines.append(f"  {row['name']:20}   missing: {row['reason']}")
            continue
        ms = row["ms_per_image"]
        speed = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
        wrong = f"  {row['status'].upper()}: {row['reason']}" if row["status"] != "ok" else ""
        lines.append(
            f"  {row['name']:20}{ms['median']:10.2f}{ms['p20']:9.2f}{ms['p80']:9.2f}"
            f"{speed:>8}{row['error']:10.1e}{wrong}"
        )
    if (scenario["others_cores"] or 0) > COMPANY:
        lines.append(f"  DISTURBED: other programs used {scenario['others_cores']} cores meanwhile")
    return "\n".join(lines)


def _status(text: str) -> None:
    """One line that the next one overwrites; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def selected(factories: Mapping[str, peers.Factory], only: str | None) -> dict[str, peers.Factory]:
    """The contestants to run; the baseline always does."""
    words = [word.strip() for word in only.split(",")] if only else [""]
    return {
        name: factory
        for name, factory in factories.items()
        if name == peers.BASELINE or any(word in name for word in words)
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    about = environment.describe()
    machine = about["machine"]
    print(
        f"{machine['cpu']} ({machine['isa']}), {about['threads']} threads, "
        f"torch {about['versions']['torch']}, commit {about['commit']}, {about['date']}"
    )

    scenarios = []

    def report(scenario: dict[str, Any]) -> None:
        scenarios.append(scenario)
        print(f"\n{table(scenario)}", flush=True)

    weights = workload.seeded_weights(heads=False)
    for batch in args.batch:
        work = workload.inference_workload(weights, batch, size=args.size)
        for dtype in args.dtype:
            factories = selected(peers.INFERENCE, args.only)
            rounds = args.rounds or rounds_for(batch)
            report(run_scenario("inference", factories, work, dtype, rounds, args.patience))
    if not args.no_train:
        weights = workload.seeded_weights(heads=True)
        work = workload.training_workload(weights, args.train_batch, size=args.size)
        for dtype in args.train_dtype:
            factories = selected(peers.TRAINING, args.only)
            rounds = args.rounds or 20
            report(run_scenario("training step", factories, work, dtype, rounds, args.patience))

    about["load_average_after"] = environment.machine()["load_average"]
    result = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **about, "scenarios": scenarios}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {args.json}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")

    wrong = [
        f"{row['name']} ({scenario['kind']}, {scenario['dtype']}, batch {scenario['batch']})"
        for scenario in scenarios
        for row in scenario["contestants"]
        if row["status"] == "wrong" and row["name"].startswith(OURS)
    ]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
