"""Plots of result files: how cost grows, with the floor drawn in, and contestants side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["draw", "growth", "inference"]

_SIZE = (7.0, 4.2)  # inches


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """All plots that a result has something for."""
    folder.mkdir(parents=True, exist_ok=True)
    along = [s for s in result["scenarios"] if s.get("axis")]
    found = []
    for axis in dict.fromkeys(s["axis"] for s in along):
        path = folder / f"growth-{axis}.png"
        growth([s for s in along if s["axis"] == axis], axis, path)
        found.append(path)
    plain = [s for s in result["scenarios"] if not s.get("axis") and s["kind"] == "inference"]
    for l2, dtype in dict.fromkeys((s.get("l2"), s["dtype"]) for s in plain):
        path = folder / f"inference-{dtype}{f'-{l2}' if l2 else ''}.png"
        inference([s for s in plain if (s.get("l2"), s["dtype"]) == (l2, dtype)], path)
        found.append(path)
    return found


def _lines(
    scenarios: Sequence[Mapping[str, Any]], key: str
) -> dict[str, list[tuple[float, Mapping[str, float]]]]:
    """ms an image by contestant: the place on the axis, and median, p20, p80."""
    lines: dict[str, list[tuple[float, Mapping[str, float]]]] = {}
    for scenario in scenarios:
        for row in scenario["contestants"]:
            if "ms_per_image" in row:
                lines.setdefault(row["name"], []).append((scenario[key], row["ms_per_image"]))
    return lines


def growth(scenarios: Sequence[Mapping[str, Any]], axis: str, path: Path) -> None:
    """One line a contestant, its band from p20 to p80, and the floor below them."""
    figure, axes = plt.subplots(figsize=_SIZE)
    for name, points in _lines(scenarios, axis).items():
        points = sorted(points, key=lambda point: point[0])
        x = [place for place, _ in points]
        bold = 2.2 if name.startswith("ours") else 1.2
        axes.plot(x, [ms["median"] for _, ms in points], marker="o", ms=3, lw=bold, label=name)
        axes.fill_between(
            x, [ms["p20"] for _, ms in points], [ms["p80"] for _, ms in points], alpha=0.15
        )
    floor = sorted((s[axis], s["floor_ms_per_image"]) for s in scenarios)
    axes.plot(*zip(*floor, strict=True), "k--", lw=1, label=f"floor: {scenarios[0]['floor_of']}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = [place for place, _ in floor]
    axes.set_xticks(places, [str(place) for place in places])
    labels = {"size": "side of the images, pixels", "batch": "images a call"}
    axes.set_xlabel(labels.get(axis, axis))
    fixed = [f"{k} {scenarios[0][k]}" for k in ("batch", "size", "threads") if k != axis]
    _finish(figure, axes, f"{scenarios[0]['dtype']}, {', '.join(fixed)}", path)


def inference(scenarios: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars by batch size; a contestant that is missing has none."""
    figure, axes = plt.subplots(figsize=_SIZE)
    batches = sorted({s["batch"] for s in scenarios})
    lines = _lines(scenarios, "batch")
    width = 0.8 / max(1, len(lines))
    for i, (name, points) in enumerate(lines.items()):
        x = [batches.index(int(batch)) + (i - len(lines) / 2 + 0.5) * width for batch, _ in points]
        axes.bar(x, [ms["median"] for _, ms in points], width, label=name)
    for scenario in scenarios:
        if "floor_ms_per_image" in scenario:
            at, floor = batches.index(scenario["batch"]), scenario["floor_ms_per_image"]
            axes.plot([at - 0.4, at + 0.4], [floor, floor], "k--", lw=1)
    axes.set_xticks(range(len(batches)), [f"batch {n}" for n in batches])
    title = f"inference, {scenarios[0]['dtype']}"
    if l2 := scenarios[0].get("l2"):
        title += f", {l2} L2"
    _finish(figure, axes, title, path)


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_ylabel("ms an image")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
