"""The report of gpu_report.py as markdown, and what in it is wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

import markdown

__all__ = ["render", "wrong"]

Report = Mapping[str, Any]


def _all(report: Report, kind: str) -> Iterator[dict[str, Any]]:
    for step in report["steps"]:
        for finding in step["findings"]:
            if kind in finding:
                yield finding[kind]


def wrong(report: Report) -> list[str]:
    """A line for each result of ours beyond its limit, and for each test that did not pass."""
    lines = []
    for check in _all(report, "check"):
        if not check["ok"]:
            launches = ", ".join(launch["name"] for launch in check.get("wrong", ()))
            lines.append(f"{_case(check)}: {check.get('raised') or launches or 'the logits'}")
    for found in _all(report, "scenario"):
        for row in found["contestants"]:
            if row["status"] == "wrong" and row["name"].startswith("ours"):
                lines.append(f"{found['kind']}, batch {found['batch']}, {row['name']}")
    for kernel in _all(report, "kernel"):
        if "error" in kernel:
            lines.append(f"{kernel['name']}, batch {kernel['batch']}: {kernel['error']}")
    for tests in _all(report, "tests"):
        lines += tests["not_passed"]
    return lines


def _case(check: Mapping[str, Any]) -> str:
    size = " x ".join(map(str, check["size"]))
    return f"{check['variant']} {check['dtype']} {check['batch']} x {size} {check['images']}"


def render(report: Report) -> str:
    """Everything; sections without findings are left out."""
    text = ["# GPU report", ""]
    for environment in _all(report, "environment"):
        text += [markdown.about(environment), ""]
        if environment.get("gpu"):
            facts = [(key, str(value)) for key, value in environment["gpu"].items()]
            text += [markdown.table(("GPU", ""), facts), ""]
    for roof in _all(report, "roof"):
        text += [
            f"Measured here: {roof['flops'] / 1e12:.3g} TFLOP/s in a large {roof['dtype']} matrix "
            f"product, {roof['bytes'] / 1e12:.3g} TB/s in a large copy.",
            "",
        ]
    steps = [(s["name"], s["status"], f"{s['seconds']:.0f}") for s in report["steps"]]
    text += [markdown.table(("step", "status", "s"), steps), ""]
    if problems := wrong(report):
        text += ["## Wrong", "", *(f"- {line}" for line in problems), ""]
    for tests in _all(report, "tests"):
        count = ", ".join(f"{n} {word.lower()}" for word, n in sorted(tests["count"].items()))
        text += [f"Tests marked `cuda`: {count}.", ""]
    for section in (_checks, _training, _scenarios, _kernels):
        text += section(report)
    for step in report["steps"]:
        if step.get("output"):
            text += [f"## Output of {step['name']}", "", "```", step["output"].strip(), "```", ""]
    return "\n".join(text)


def _checks(report: Report) -> list[str]:
    rows = []
    for check in _all(report, "check"):
        if "raised" in check:
            rows.append((_case(check), *[""] * 5, "**raised**"))
            continue
        errors = [f"{check[key]:.1e}" if key in check else "" for key in ("error", "eager")]
        closest = "" if check["closest"] is None else f"{100 * check['closest']:.0f} %"
        verdict = "ok" if check["ok"] else "**wrong**"
        repeats = "yes" if check["repeats"] else "**no**"
        rows.append((_case(check), *errors, str(check["launches"]), closest, repeats, verdict))
    header = ("case", "error", "eager's", "launches checked", "of their limit", "repeats", "")
    return ["## Correctness", "", markdown.table(header, rows), ""] if rows else []


def _scenarios(report: Report) -> list[str]:
    found = [markdown.scenario(scenario) for scenario in _all(report, "scenario")]
    return ["## Times", "", "\n\n".join(found), ""] if found else []


# The columns of a training step: scenarios by their kind.
_PARTS = {
    "forward": "training forward",
    "backward": "training backward",
    "both": "training step",
    "with optimizer": "training step with optimizer",
}


def _training(report: Report) -> list[str]:
    """The parts of a training step side by side, ms an image, and its memory."""
    tables: dict[tuple[str, int], dict[str, dict[str, dict[str, Any]]]] = {}
    for found in _all(report, "scenario"):
        if found["kind"] in _PARTS.values():
            rows = tables.setdefault((found["dtype"], found["batch"]), {})
            for row in found["contestants"]:
                rows.setdefault(row["name"], {}).setdefault(found["kind"], row)
    text = []
    for (dtype, batch), rows in tables.items():
        body = []
        for name, by_kind in rows.items():
            step = by_kind.get("training step", {})
            memory = (step.get(f"{key}_mb_per_image") for key in ("peak", "saved"))
            body.append(
                (
                    name,
                    *(_median(by_kind.get(kind, {})) for kind in _PARTS.values()),
                    f"{step['speedup']:.2f}x" if step.get("speedup") else "",
                    *("" if size is None else f"{size:.1f}" for size in memory),
                )
            )
        header = ("ms an image", *_PARTS, "speed of both", "peak MB an image", "saved MB an image")
        text += [f"### Training, {dtype}, batch {batch}", "", markdown.table(header, body), ""]
    return ["## Training", "", *text] if text else []


def _median(row: Mapping[str, Any]) -> str:
    if "ms_per_image" not in row:
        return ""
    wrong = "" if row["status"] == "ok" else f" **{row['status']}**"
    return markdown.ms(row["ms_per_image"]["median"]) + wrong


def _kernels(report: Report) -> list[str]:
    by_batch: dict[int, list[dict[str, Any]]] = {}
    for kernel in _all(report, "kernel"):
        by_batch.setdefault(kernel["batch"], []).append(kernel)
    text = []
    for batch, kernels in by_batch.items():
        rows = []
        for kernel in kernels:
            if "warm_us" not in kernel:
                rows.append((kernel["name"], kernel.get("error", ""), "", "", "", ""))
                continue
            seconds = kernel["warm_us"]["median"] / 1e6
            rows.append(
                (
                    kernel["name"],
                    f"{kernel['warm_us']['median']:.2f}",
                    f"{kernel['cold_us']['median']:.2f}" if "cold_us" in kernel else "",
                    f"{kernel['flops'] / seconds / 1e12:.1f}",
                    f"{kernel['bytes'] / seconds / 1e9:.0f}",
                    f"{100 * kernel['share_of_floor']:.0f} %",
                )
            )
        timed = [kernel for kernel in kernels if "warm_us" in kernel]
        total = sum(kernel["warm_us"]["median"] for kernel in timed)
        floor = sum(kernel["floor_us"] for kernel in timed)
        header = ("launch", "us, warm L2", "us, cold L2", "TFLOP/s", "GB/s", "share of its floor")
        text += [f"### Launches, batch {batch}", "", markdown.table(header, rows), ""]
        text += [f"{total:.1f} us in all; their floors add up to {floor:.1f} us.", ""]
    return ["## Kernels", "", *text] if text else []
