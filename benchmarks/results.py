"""Result files: what heads them, and reading those of any version that there has been.

``schema`` is ``inception_ext.benchmarks`` (also ``inception_ext.bench_cpu`` for files of
``bench_cpu.py``, ``inception_ext.gpu_report``). ``schema_version`` counts changes after which older
readers would misread a file; new entries alone do not change it. README.md describes the entries.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import environment

__all__ = ["FOLDER", "SCHEMA", "SCHEMA_VERSION", "head", "load", "scenarios", "write", "wrong"]

SCHEMA = "inception_ext.benchmarks"
SCHEMA_VERSION = 1
_READABLE = {SCHEMA: 1, "inception_ext.bench_cpu": 1, "inception_ext.gpu_report": 1}
FOLDER = Path(__file__).resolve().parent / "results"


def head() -> dict[str, Any]:
    """Schema, date, commit, machine, GPU, threads, versions."""
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **environment.describe()}


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        ValueError: the file is none, or of a version that this program does not know.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        schema, version = result["schema"], result["schema_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a result file of these benchmarks") from error
    if version != _READABLE.get(schema):
        known = ", ".join(f"{name} {number}" for name, number in _READABLE.items())
        raise ValueError(f"{path}: expected schema {known}, got {schema} {version}")
    if schema == "inception_ext.gpu_report":
        result = _flattened(result)
    return result


def _flattened(report: dict[str, Any]) -> dict[str, Any]:
    """A GPU report with its environment and scenarios where other files have them."""
    flat: dict[str, Any] = {**report, "scenarios": [], "kernels": []}
    for step in report["steps"]:
        for finding in step["findings"]:
            flat |= finding.get("environment", {})
            for kind in ("scenario", "kernel"):
                if kind in finding:
                    flat[f"{kind}s"].append(finding[kind])
    return flat


def scenarios(result: Mapping[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The scenarios of a file with these entries, such as ``kind="inference", batch=8``."""
    return [
        found
        for found in result["scenarios"]
        if all(found.get(key) == value for key, value in wanted.items())
    ]


def wrong(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of our contestants whose results are wrong, with their scenarios."""
    return [
        f"{row['name']} ({scenario['kind']}, {scenario['dtype']}, batch {scenario['batch']})"
        for scenario in found
        for row in scenario["contestants"]
        if row["status"] == "wrong" and row["name"].startswith("ours")
    ]
