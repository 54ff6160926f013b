"""The parts of the documentation that are made from result files, by name.

A page holds ``<!-- generated: NAME -->`` and ``<!-- end -->``; ``python benchmarks/report.py
--docs`` writes what comes between them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import counts
import floors
import floors_training
import markdown
import results
from timing import COMPANY

__all__ = ["BLOCKS", "PAGES", "filled", "pages"]

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "benchmarks/README.md", "docs/**/*.md")
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# How the README calls the contestants.
_TITLES = {
    "ours freeze": "**`freeze`**",
    "ours freeze, CUDA graph": "**`freeze`** in one CUDA graph",
    "ours eval": "model, eval mode",
    "ours": "**ours**",
    "eager channels_last": "torchvision eager, channels_last",
    "eager": "torchvision eager, NCHW",
    "compile frozen": "`torch.compile`, freezing",
    "compile": "`torch.compile`",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
}


def _speed(scenarios: Sequence[Mapping[str, Any]]) -> str:
    """Contestants by scenario: ms an image, and in brackets the speed against the baseline."""
    dtypes = list(dict.fromkeys(s["dtype"] for s in scenarios))
    scenarios = sorted(scenarios, key=lambda s: (dtypes.index(s["dtype"]), s["batch"]))
    order = list(_TITLES)
    names = list(dict.fromkeys(row["name"] for s in scenarios for row in s["contestants"]))
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    header = ["ms an image", *(f"{s['dtype']}, batch {s['batch']}" for s in scenarios)]
    rows = []
    for name in names:
        cells = [_TITLES.get(name, name)]
        for scenario in scenarios:
            found = {row["name"]: row for row in scenario["contestants"]}.get(name, {})
            cells.append(_cell(found, scenario))
        rows.append(cells)
    return markdown.table(header, rows)


def _cell(row: Mapping[str, Any], scenario: Mapping[str, Any]) -> str:
    if "ms_per_image" not in row:
        no_bf16 = scenario["dtype"] == "bf16" and "bfloat16" in (row.get("reason") or "").lower()
        return "no bf16" if no_bf16 else row.get("status", "")
    time = markdown.ms(row["ms_per_image"]["median"])
    speed = f" ({row['speedup']:.2f}x)" if row["speedup"] else ""
    return f"{time}{speed}" if row["status"] == "ok" else f"{time}{speed} **{row['status']}**"


def cpu() -> str:
    """The README's table of inference on a CPU, and the training step below it."""
    result = results.load(results.FOLDER / "cpu-2-cores.json")
    text = [
        f"{markdown.about(result)} Images of 224 x 224, all contestants in turns in one process; "
        "in brackets the speed against eager channels_last in the same dtype. Medians; spread and "
        "errors are in [the JSON](benchmarks/results/cpu-2-cores.json).",
        "",
        _speed(results.scenarios(result, kind="inference")),
    ]
    for scenario in results.scenarios(result, kind="training step"):
        times = ", ".join(
            f"{_TITLES.get(row['name'], row['name'])} {_cell(row, scenario)}"
            for row in scenario["contestants"]
        )
        text += [
            "",
            f"Training step (both heads, forward, loss and backward), {scenario['dtype']}, batch "
            f"{scenario['batch']}, ms an image: {times}.",
        ]
    return "\n".join(text)


def gpu() -> str:
    """Inference on GPUs, from the reports of gpu_report.py that are in results/."""
    text = []
    for path in sorted(results.FOLDER.glob("gpu-*.json")):
        result = results.load(path)
        warm = results.scenarios(result, kind="inference", l2="warm")
        best: dict[int, dict[str, Any]] = {}
        for scenario in warm:  # the steps of a report each have some of the contestants
            merged = best.setdefault(scenario["batch"], {**scenario, "contestants": []})
            names = {row["name"] for row in merged["contestants"]}
            merged["contestants"] += [r for r in scenario["contestants"] if r["name"] not in names]
        text += [markdown.about(result), "", _speed([best[n] for n in sorted(best)]), ""]
    if not text:
        return "No GPU has been measured yet; `python benchmarks/gpu_report.py` does it."
    return "\n".join(text).rstrip()


def h100() -> str:
    return floors.render(floors.network(), [1, 8, 32, 128, 256], 224, 2)


def training_floors() -> str:
    """Bytes and least times of a training step by schedule."""
    layers = floors.trace(floors.network())
    rows = []
    for name, passes in floors_training.SCHEDULES.items():
        chain = floors_training.stages(layers, name)
        times = [
            " / ".join(f"{floors.seconds(chain, batch, roof) * 1e3:.2f}" for roof in floors.H100)
            for batch in (32, 128, 256)
        ]
        megabytes = f"{floors.total(chain).bytes / 1e6:.1f}"
        rows.append((name, passes.about, megabytes, *times))
    flops = floors.total(chain).flops
    batches = (f"ms, batch {batch}" for batch in (32, 128, 256))
    header = ("schedule", "what it is", "MB an image", *batches)
    return f"{flops / 1e9:.2f} GFLOP an image.\n\n{markdown.table(header, rows, words=(0, 1))}"


def overhead() -> str:
    result = results.load(results.FOLDER / "overhead-2-cores.json")
    (scenario,) = results.scenarios(result, kind="overhead")
    rows = []
    for row in scenario["contestants"]:
        times = [f"{row['ms_per_image'][key] * 1e3:.2f}" for key in ("median", "p20", "p80")]
        added = f"{row['added_us']:+.2f} on {row['over']}" if "added_us" in row else ""
        rows.append((row["name"], *times, added))
    header = ("call", "us, median", "p20", "p80", "what the layer adds")
    return f"{markdown.about(result)}{_company(scenario)}\n\n{markdown.table(header, rows)}"


def _company(scenario: Mapping[str, Any]) -> str:
    """Who else used the machine, where that was more than a measurement should have."""
    others = scenario["others_cores"] or 0
    return f" Other programs used {others} cores meanwhile." if others > COMPANY else ""


def growth() -> str:
    """Tables of how cost grows along each axis."""
    result = results.load(results.FOLDER / "growth-2-cores.json")
    text = [markdown.about(result)]
    for axis in dict.fromkeys(s["axis"] for s in result["scenarios"]):
        along = [s for s in result["scenarios"] if s["axis"] == axis]
        names = [row["name"] for row in along[0]["contestants"]]
        header = [axis, *(_TITLES.get(name, name) for name in names), "floor"]
        rows = []
        for scenario in along:
            by_name = {row["name"]: row for row in scenario["contestants"]}
            cells = [_cell(by_name.get(name, {}), scenario) for name in names]
            rows.append((str(scenario[axis]), *cells, markdown.ms(scenario["floor_ms_per_image"])))
        fixed = [f"{k} {along[0][k]}" for k in ("batch", "size", "threads") if k != axis]
        text += ["", f"By {axis} ({', '.join(fixed)}), {along[0]['dtype']}, ms an image:", ""]
        text += [markdown.table(header, rows), "", f"![by {axis}](plots/growth-{axis}.png)"]
    return "\n".join(text)


def parts() -> str:
    """The stem and the nine modules on a CPU, forward, and forward and backward in training."""
    result = results.load(results.FOLDER / "parts-2-cores.json")
    forward = [s for s in result["scenarios"] if s["name"] == s["kind"].removeprefix("inception")]
    rows = []
    for scenario in forward:
        (training,) = results.scenarios(result, kind=f"training {scenario['kind']}")
        by_name = {row["name"]: row for row in scenario["contestants"]}
        trained = {row["name"]: row for row in training["contestants"]}
        rows.append(
            (
                scenario["kind"],
                *(_cell(by_name[name], scenario) for name in _FORWARD),
                markdown.ms(scenario["floor_ms_per_image"]),
                *(_cell(trained[name], training) for name in _TRAINING),
                " / ".join(f"{trained[name]['saved_mb_per_image']:.1f}" for name in _TRAINING),
            )
        )
    about = f"{forward[0]['dtype']}, batch {forward[0]['batch']}"
    header = [
        f"ms an image, {about}",
        *(f"{_TITLES[name]}, forward" for name in _FORWARD),
        "floor",
        *(f"{_TITLES[name]}, forward + backward" for name in _TRAINING),
        "MB saved an image: ours / eager / compile",
    ]
    return f"{markdown.about(result)}\n\n{markdown.table(header, rows)}"


_FORWARD = ("ours freeze", "ours eval", "eager channels_last", "compile")
_TRAINING = ("ours", "eager channels_last", "compile")


def counters() -> str:
    """What the emulator has counted, beside the floors of the same schedule."""
    files = [counts.read(path) for path in sorted(results.FOLDER.glob("counters*.json"))]
    found = sorted((f for f in files if f is not None), key=lambda f: (f["dtype"], f["batch"]))
    rows = [counts.row(f) for f in found]
    return markdown.table(counts.HEADER, rows) if rows else "Not counted yet."


def training_counters() -> str:
    """The same of a training step."""
    paths = sorted(results.FOLDER.glob("counters*.json"))
    files = [counts.read(path, training=True) for path in paths]
    rows = [counts.training_row(found) for found in files if found is not None]
    return markdown.table(counts.TRAINING_HEADER, rows) if rows else "Not counted yet."


BLOCKS: Mapping[str, Callable[[], str]] = {
    "cpu": cpu,
    "gpu": gpu,
    "h100-floors": h100,
    "training-floors": training_floors,
    "overhead": overhead,
    "parts": parts,
    "growth": growth,
    "counters": counters,
    "training-counters": training_counters,
}


def filled(text: str) -> str:
    """A page with its blocks made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{_made(found[2])}\n{found[3]}", text)


def _made(name: str) -> str:
    try:
        return BLOCKS[name]()
    except FileNotFoundError:
        return "Not measured yet."


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that hold blocks."""
    found = sorted({path for pattern in PAGES for path in root.glob(pattern)})
    return [path for path in found if _BLOCK.search(path.read_text(encoding="utf-8"))]
