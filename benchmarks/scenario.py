"""One scenario: contestants checked, timed, and written down as a part of a result file."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import devices
import peers
import torch
from timing import COMPANY, Candidate, Result, contest, largest, together
from workload import Workload

__all__ = ["DTYPES", "error_limit", "rounds_for", "row", "run", "say", "table"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative error that is always right, beside twice that of the baseline in the same dtype. On a
# GPU torch rounds the factors of float32 convolutions to TF32, which has the bits of float16.
NOISE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3}
# What ReLUs and max pools that rounding decides may move a gradient by: 3e-2 is the most that was
# seen of eager in float32. It tells gross mistakes only, see :mod:`decisions`.
CHANCE = 5e-2


def error_limit(noise: float, errors: Mapping[str, float | None]) -> float:
    """Twice the error of eager in the same dtype, plus a floor."""
    return 2 * (errors.get(peers.BASELINE) or 0.0) + noise


def rounds_for(batch: int) -> int:
    """Turns that give about 100 samples at batch 1 and at least 20 anywhere."""
    return max(20, 50 // batch)


def run(
    kind: str,
    factories: Mapping[str, peers.Factory],
    work: Workload,
    dtype: str,
    *,
    device: devices.Device,
    rounds: int,
    cold: bool = False,
    warmup: int = 2,
    patience: float = 0.0,
    memory: bool = False,
    floor: float | None = None,
    by_chance: bool = False,
    **facts: Any,
) -> dict[str, Any]:
    """Checks and times one scenario.

    Args:
        kind: such as "inference".
        factories: contestants by name, in the order of the table.
        dtype: a key of DTYPES.
        device: where they run.
        rounds, warmup, patience: as in :func:`timing.interleave`.
        cold: whether a GPU's L2 cache is emptied before each call.
        memory: whether to find the contestants' peak memory and, for kinds that begin with
            "training", the bytes that they save for backward.
        floor: the least seconds that a batch takes, if that is known.
        by_chance: whether rounding decides ReLUs or max pools before the results, so that only
            gross mistakes can be told.
        **facts: further entries of the result.
    """
    batch = len(work.images[0])
    noise = NOISE["tf32" if dtype == "fp32" and device.type == "cuda" else dtype]
    if by_chance:
        noise = max(noise, CHANCE)

    def announce(text: str) -> None:
        say(f"{kind} {dtype} batch {batch}: {text}")

    outcome = contest(
        [Candidate(name, partial(f, work, DTYPES[dtype])) for name, f in factories.items()],
        work.references,
        rounds=rounds,
        warmup=warmup,
        patience=patience,
        limit=partial(error_limit, noise),
        judge=together if kind.startswith("training") else largest,
        inputs=len(work.images),
        timer=partial(device.seconds, cold=cold),
        probes=_probes(device, memory, batch, kind),
        announce=announce,
        progress=lambda done: announce(f"round {done} of {rounds}"),
    )
    say("")
    results = outcome.results
    baseline = next((r.summary for r in results if r.name == peers.BASELINE and r.summary), None)
    scenario: dict[str, Any] = {
        "kind": kind,
        "device": device.type,
        "l2": ("cold" if cold else "warm") if device.type == "cuda" else None,
        "dtype": dtype,
        "batch": batch,
        "size": work.images[0].shape[-1],
        "rounds": rounds,
        "others_cores": outcome.others_cores,
        "repeated_rounds": outcome.repeated,
        "baseline": peers.BASELINE,
        **facts,
    }
    if floor is not None:
        scenario["floor_ms_per_image"] = _digits(floor * 1e3 / batch)
    median = baseline.median if baseline else None
    scenario["contestants"] = [row(result, batch, median, floor) for result in results]
    return scenario


def row(result: Result, batch: int, baseline: float | None, floor: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": result.name, "status": result.status, "reason": result.reason}
    found["error"] = result.error
    if result.summary:
        times = result.summary
        found["ms_per_image"] = {
            key: _digits(getattr(times, key) * 1e3 / batch) for key in ("median", "p20", "p80")
        }
        found["samples"] = times.samples
        found["speedup"] = round(baseline / times.median, 3) if baseline else None
        if floor is not None:
            found["share_of_floor"] = round(floor / times.median, 4)
    return found | {
        name: _digits(value) for name, value in result.probed.items() if value is not None
    }


def _probes(
    device: devices.Device, memory: bool, batch: int, kind: str
) -> dict[str, Callable[[Callable[[], Any]], float | None]]:
    """Peak memory, and for training what is saved for backward, both in MB an image."""

    def peak(call: Callable[[], Any]) -> float | None:
        found = device.peak_bytes(call)
        return None if found is None else found / 1e6 / batch

    def saved(call: Callable[[], Any]) -> float | None:
        return devices.saved_bytes(call) / 1e6 / batch

    if not memory:
        return {}
    if kind.startswith("training"):
        return {"peak_mb_per_image": peak, "saved_mb_per_image": saved}
    return {"peak_mb_per_image": peak}


def _digits(value: float) -> float:
    """Five digits that count."""
    return float(f"{value:.5g}")


def table(scenario: Mapping[str, Any]) -> str:
    """The scenario as text, ms an image."""
    rows = scenario["contestants"]
    title = "{kind}, {dtype}, batch {batch}, {size} x {size}".format(**scenario)
    if scenario.get("l2"):
        title += f", {scenario['l2']} L2"
    width = max(20, *(len(row["name"]) for row in rows))
    extras: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    if "floor_ms_per_image" in scenario:
        title += f", floor {scenario['floor_ms_per_image']:.3g} ms an image"
        extras.append(("floor", lambda row: f"{100 * row['share_of_floor']:.0f} %"))
    for key, name in (("peak_mb_per_image", "peak MB"), ("saved_mb_per_image", "saved MB")):
        if any(key in row for row in rows):
            extras.append((name, lambda row, key=key: f"{row[key]:.1f}" if key in row else "-"))
    head = f"  {'':{width}}{'ms/image':>10}{'p20':>9}{'p80':>9}{'speed':>8}{'error':>10}"
    lines = [title, head + "".join(f"{name:>9}" for name, _ in extras)]
    for row in rows:
        if "ms_per_image" not in row:
            lines.append(f"  {row['name']:{width}}   {row['status']}: {row['reason']}")
            continue
        ms = row["ms_per_image"]
        speed = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        wrong = f"  {row['status'].upper()}: {row['reason']}" if row["status"] != "ok" else ""
        decimals = 2 if ms["median"] >= 1 else 4
        lines.append(
            f"  {row['name']:{width}}"
            + f"{ms['median']:10.{decimals}f}{ms['p20']:9.{decimals}f}{ms['p80']:9.{decimals}f}"
            + f"{speed:>8}{error:>10}"
            + "".join(f"{show(row):>9}" for _, show in extras)
            + wrong
        )
    if (scenario["others_cores"] or 0) > COMPANY:
        lines.append(f"  DISTURBED: other programs used {scenario['others_cores']} cores meanwhile")
    return "\n".join(lines)


def say(text: str) -> None:
    """One line that the next one overwrites; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
