"""Whether anything became slower: two result files, contestant by contestant.

    python benchmarks/compare.py OLD.json NEW.json --threshold 0.05

A ratio above 1 means that NEW takes longer. The band is what the ratio may be by the samples'
noise: from the 20th percentile of NEW over the 80th of OLD to the opposite. Slower is what lies
beyond the threshold and whose band does not reach 1; the exit status is then 1. ``--relative``
compares times as multiples of the baseline in the same file, for machines that differ in speed.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import results

Key = tuple[Any, ...]


class Times(NamedTuple):
    median: float
    p20: float
    p80: float


class Ratio(NamedTuple):
    """NEW over OLD, with the noise band from low to high."""

    what: str
    old: float
    new: float
    ratio: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """slower, faster, or nothing where the difference may be noise or is small."""
        if self.ratio > 1 + threshold and self.low > 1:
            return "slower"
        if self.ratio < 1 / (1 + threshold) and self.high < 1:
            return "faster"
        return ""


def times(result: Mapping[str, Any], relative: bool = False) -> dict[Key, Times]:
    """Times by what identifies them: ms an image, microseconds of a launch, or multiples."""
    found: dict[Key, Times] = {}
    for scenario in result["scenarios"]:
        key = tuple(scenario.get(k) for k in ("kind", "dtype", "batch", "size", "l2"))
        threads = scenario.get("threads", result.get("threads"))
        rows = {row["name"]: row for row in scenario["contestants"] if "ms_per_image" in row}
        unit = 1.0
        if relative:
            if scenario["baseline"] not in rows:
                continue
            unit = rows[scenario["baseline"]]["ms_per_image"]["median"]
        for name, row in rows.items():
            if relative and name == scenario["baseline"]:
                continue
            ms = row["ms_per_image"]
            found[(*key, f"{threads} threads", name)] = Times(
                *(ms[k] / unit for k in Times._fields)
            )
    if not relative:
        for kernel in result.get("kernels", ()):
            for l2 in ("warm", "cold"):
                if us := kernel.get(f"{l2}_us"):
                    place = (kernel["dtype"], kernel["batch"], kernel["index"], kernel["name"])
                    found[("launch", *place, f"{l2} L2")] = Times(*(us[k] for k in Times._fields))
    return found


def ratios(old: Mapping[Key, Times], new: Mapping[Key, Times]) -> Iterator[Ratio]:
    """For what both have, in the order of the new."""
    for key, after in new.items():
        if before := old.get(key):
            what = ", ".join(str(part) for part in key if part is not None)
            yield Ratio(
                what,
                before.median,
                after.median,
                after.median / before.median,
                after.p20 / before.p80,
                after.p80 / before.p20,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.05, help="0.05: 5 %% slower")
    parser.add_argument("--relative", action="store_true", help="multiples of the baseline")
    parser.add_argument("--only", default="", help="lines that contain this")
    args = parser.parse_args(argv)
    try:
        old, new = (times(results.load(path), args.relative) for path in (args.old, args.new))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    found = [ratio for ratio in ratios(old, new) if args.only in ratio.what]
    if not found:
        parser.error("the files have nothing in common")
    print(f"{'new/old':>8}  {'band':13}  {'old':>9}  {'new':>9}")
    for r in found:
        band = f"{r.low:.2f} - {r.high:.2f}"
        verdict = r.verdict(args.threshold)
        line = f"{r.ratio:8.3f}  {band:13}  {r.old:9.4g}  {r.new:9.4g}  {verdict:6}  {r.what}"
        print(line)
    gone = len(old.keys() - new.keys())
    slower = [r for r in found if r.verdict(args.threshold) == "slower"]
    print(f"\n{len(found)} compared, {len(slower)} slower; {gone} of the old are not in the new")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
