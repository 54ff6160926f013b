"""All benchmarks in one command; see benchmarks/README.md.

    python -m benchmarks --list
    python -m benchmarks --json result.json            # everything for this machine
    python -m benchmarks I8 3a growth-batch --only ours,eager
    python -m benchmarks --quick                       # tries everything within two minutes

The exit status is 1 where a result of ours is wrong.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import markdown
import results
import scenario
from devices import device_for
from scenarios import SCENARIOS, Options


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("scenario", nargs="*", metavar="SCENARIO", help="of --list; default: those for the device")
    add("--list", action="store_true", help="list the scenarios")
    add("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--dtype", nargs="+", choices=scenario.DTYPES, help="default: by scenario and device")
    add("--only", default="", help="contestants whose name contains one of these, comma-separated")
    add("--rounds", type=int, help="turns of each contestant; default: by the batch")
    add("--patience", type=float, default=0.0, help="seconds a table for disturbed rounds")
    add("--threads", type=int, default=torch.get_num_threads(), help="for every contestant")
    add("--json", type=Path, metavar="FILE", help="write the result here, after each scenario")
    args = parser.parse_args(argv)
    if unknown := sorted({*args.scenario} - {*SCENARIOS}):
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds should be at least 1")
    return args


def listing() -> str:
    rows = [
        (s.name, s.about, " ".join(s.on_gpu) or "when asked", " ".join(s.on_cpu) or "when asked")
        for s in SCENARIOS.values()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    head = ("", "", "on a GPU", "on a CPU")
    return "\n".join(
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in (head, *rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print(listing())
        return 0
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    options = Options(
        device_for(args.device),
        quick=args.quick,
        only=tuple(word.strip() for word in args.only.split(",") if word.strip()),
        rounds=args.rounds,
        patience=args.patience,
        dtypes=tuple(args.dtype) if args.dtype else None,
    )
    result: dict[str, Any] = {**results.head(), "quick": args.quick, "scenarios": []}
    print(markdown.about(result), flush=True)
    plan = [
        (found, dtype)
        for found in SCENARIOS.values()
        if not args.scenario or found.name in args.scenario
        for dtype in found.dtypes(options, asked_for=bool(args.scenario))
    ]
    for number, (wanted, dtype) in enumerate(plan, 1):
        spent = time.perf_counter() - start
        print(f"\n[{number}/{len(plan)}, {spent:.0f} s] {wanted.name} {dtype}: {wanted.about}")
        for found in wanted.run(options, dtype):
            result["scenarios"].append({"name": wanted.name, **found})
            print(scenario.table(found), flush=True)
            if args.json:
                results.write(result, args.json)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if args.json:
        print(f"wrote {args.json}")
    if wrong := results.wrong(result["scenarios"]):
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
