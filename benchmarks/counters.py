"""What a forward pass of the frozen GoogLeNet does, counted: launches, bytes, MACs, bank conflicts.

    python benchmarks/counters.py --batch 8 --dtype float16 --json FILE

The CUDA kernels run on the emulator (a build with INCEPTION_EXT_EMULATOR=1), so no GPU is needed,
and the numbers are those of the program: they are the same on every machine.

launches                  kernels of one forward pass
launches_per_module       of the Inception module that has the most
bytes_touched_per_image   bytes that must cross device memory: each once a launch, read and written
                          apart, the images too; without weights and biases
stem_bytes_per_image      of these, up to and including the second pool
bytes_issued_per_image    bytes that all threads together ask for: what the L2 cache sees
useful_mac_share          of the multiply-accumulates that the kernels issue
bank_conflicts            extra passes of shared memory; bank_conflict_places says where

With --train, of a training step instead: see train_counters.py.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # an inception_ext not installed

import environment
import train_counters

from inception_ext import googlenet
from inception_ext.engine import freeze
from inception_ext.testing import emulated, emulator_error

SCHEMA = "inception_ext.counters"
SCHEMA_VERSION = 1
PARAMETERS = ("weight", "bias")  # how the operands that hold them begin
LAST_OF_STEM = "maxpool2"


def count(batch: int, dtype: torch.dtype, size: int = 224, seed: int = 0) -> dict[str, Any]:
    """The counters of one forward pass over random images of this dtype."""
    torch.manual_seed(seed)
    model = googlenet(num_classes=1000, aux_logits=False, init_weights=True).eval()
    images = torch.randn(batch, 3, size, size).to(dtype)
    with emulated(checks=False):
        engine = freeze(model, dtype)
    with emulated(seed=seed) as launches:
        engine(images)
    names = engine.name_launches(images.shape)
    assert len(names) == len(launches)
    return summarize(launches, names, batch)


def summarize(
    launches: Sequence[dict[str, Any]], names: Sequence[str], batch: int
) -> dict[str, Any]:
    """What the module's docstring lists.

    Args:
        launches: as :func:`inception_ext.testing.emulated` gives them.
        names: the modules that each of them stands for.
    """
    touched = [
        sum(
            part["read"] + part["written"]
            for part in launch["touched"]
            if not part["operand"].startswith(PARAMETERS)
        )
        for launch in launches
    ]
    in_stem = 1 + max(i for i, name in enumerate(names) if LAST_OF_STEM in name)
    modules = Counter(name for name in names if name.startswith("inception"))
    issued = sum(launch["bytes_read"] + launch["bytes_written"] for launch in launches)
    conflicts: Counter[str] = Counter()
    for launch in launches:
        conflicts.update(launch["conflict_places"])
    return {
        "launches": len(launches),
        "launches_per_module": max(modules.values()),
        "bytes_touched_per_image": sum(touched) / batch,
        "stem_bytes_per_image": sum(touched[:in_stem]) / batch,
        "bytes_issued_per_image": issued / batch,
        "useful_mac_share": sum(launch["useful_macs"] for launch in launches)
        / sum(launch["issued_macs"] for launch in launches),
        "bank_conflicts": sum(launch["bank_conflicts"] for launch in launches),
        "bank_conflict_places": dict(conflicts),
        "of_each_launch": [
            {
                "modules": name,
                "op": launch["op"],
                "grid": launch["grid"],
                "bytes_touched": size,
                "bytes_issued": launch["bytes_read"] + launch["bytes_written"],
                "useful_macs": launch["useful_macs"],
                "issued_macs": launch["issued_macs"],
            }
            for name, size, launch in zip(names, touched, launches, strict=True)
        ],
    }


def render(counters: dict[str, Any], batch: int) -> str:
    """The counters as text."""
    launches = counters.get("of_each_launch", [])
    lines = [f"{'modules':26}{'op':22}{'MB/image':>9}{'useful':>8}"] if launches else []
    for launch in launches:
        issued = launch["issued_macs"]
        useful = f"{launch['useful_macs'] / issued:8.1%}" if issued else f"{'-':>8}"
        megabytes = launch["bytes_touched"] / batch / 1e6
        lines.append(f"{launch['modules']:26}{launch['op']:22}{megabytes:9.3f}{useful}")
    lines.append("")
    for key, value in counters.items():
        if key.endswith(("_per_image", "_per_step")):
            lines.append(f"{key:32}{value / 1e6:.3f} MB")
        elif isinstance(value, int | float):
            lines.append(f"{key:32}{value if isinstance(value, int) else f'{value:.4f}'}")
    lines += [f"    {n} in {place}" for place, n in counters["bank_conflict_places"].items()]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=8, help="images")
    add("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    add("--size", type=int, default=224, help="height and width of the images")
    add("--seed", type=int, default=0, help="of the images, and of the emulator's order")
    add("--train", action="store_true", help="count a training step")
    add("--json", type=Path, metavar="FILE", help="write the counters here")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch should be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if (reason := emulator_error()) is not None:
        print(f"no emulator ({reason}): build with INCEPTION_EXT_EMULATOR=1", file=sys.stderr)
        return 1
    start = time.perf_counter()
    counting = train_counters.count if args.train else count
    counters = counting(args.batch, getattr(torch, args.dtype), args.size, args.seed)
    what = "training step" if args.train else "inference"
    print(f"GoogLeNet, {what}, {args.dtype}, {args.batch} x {args.size} x {args.size}\n")
    print(render(counters, args.batch))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if args.json:
        result = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            **environment.describe(),
            "train": args.train,
            "batch": args.batch,
            "dtype": args.dtype,
            "size": args.size,
            **counters,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
