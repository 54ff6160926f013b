"""GoogLeNet on the CPU: inception_ext beside eager, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/bench_cpu.py --json result.json
    python benchmarks/bench_cpu.py --batch 8 --dtype fp32 --only ours,eager --no-train

Every contestant is checked against a float64 reference, then all are timed in turns in this one
process. The table shows milliseconds an image and the speed as a multiple of torchvision's eager
model in channels_last and the same dtype. A peer that cannot run is listed with its reason. The
exit status is 1 where a result of ours is wrong.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import devices
import environment
import peers
import results
import scenario
import workload
from scenario import rounds_for

SCHEMA = "inception_ext.bench_cpu"
SCHEMA_VERSION = 1
DTYPES = ("fp32", "bf16")


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
        args.batch, args.size, args.rounds = [2], 64, args.rounds or 2
    for name, values in (("--batch", args.batch), ("--train-batch", [args.train_batch])):
        if min(values) < 1:
            parser.error(f"{name} should be at least 1")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds should be at least 1")
    return args


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

    scenarios: list[dict[str, Any]] = []

    def run(
        kind: str,
        factories: Mapping[str, peers.Factory],
        dtype: str,
        rounds: int,
        by_chance: bool = False,
    ) -> None:
        found = scenario.run(
            kind,
            selected(factories, args.only),
            work,
            dtype,
            device=devices.Host(),
            rounds=rounds,
            patience=args.patience,
            by_chance=by_chance,
        )
        scenarios.append(found)
        print(f"\n{scenario.table(found)}", flush=True)

    weights = workload.seeded_weights(heads=False)
    for batch in args.batch:
        work = workload.inference_workload(weights, batch, size=args.size)
        for dtype in args.dtype:
            run("inference", peers.INFERENCE, dtype, args.rounds or rounds_for(batch))
    if not args.no_train:
        weights = workload.seeded_weights(heads=True)
        work = workload.decided_workload(weights)
        judged = {name: peers.TRAINING[name] for name in ("ours", peers.BASELINE)}
        for dtype in args.train_dtype:
            run("training check", peers.TRAINING if args.quick else judged, dtype, 2)
    if not (args.no_train or args.quick):
        work = workload.training_workload(weights, args.train_batch, size=args.size)
        for dtype in args.train_dtype:
            run("training step", peers.TRAINING, dtype, args.rounds or 20, by_chance=True)

    about["load_average_after"] = environment.machine()["load_average"]
    result = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **about, "scenarios": scenarios}
    if args.json:
        results.write(result, args.json)
        print(f"\nwrote {args.json}")
    print(f"\n{time.perf_counter() - start:.0f} s in all")

    if wrong := results.wrong(scenarios):
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
