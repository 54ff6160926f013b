"""What the emulator has counted, from the result files of counters.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results

__all__ = ["HEADER", "KEYS", "for_batch", "read", "row"]

KEYS = ("launches", "bytes_touched_per_image", "bytes_issued_per_image", "useful_mac_share")
HEADER = (
    *("frozen network", "launches", "MB touched an image", "MB issued an image"),
    *("useful MACs", "bank conflicts"),
)
_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def read(path: Path) -> Mapping[str, Any] | None:
    """A file of counters.py, or None where it is something else."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if all(key in found for key in ("batch", "dtype", *KEYS)) else None


def for_batch(batch: int, dtype: str, folder: Path = results.FOLDER) -> Mapping[str, Any] | None:
    """The counters of a frozen network's forward pass, or None where they were not taken.

    Args:
        dtype: fp16, bf16 or fp32.
        folder: the files are ``counters*.json``.
    """
    for path in sorted(folder.glob("counters*.json")):
        found = read(path)
        if found and (found["batch"], found["dtype"]) == (batch, _NAMES[dtype]):
            return {key: found[key] for key in KEYS}
    return None


def row(found: Mapping[str, Any]) -> list[str]:
    """Cells under HEADER."""
    return [
        f"{found['dtype']}, batch {found['batch']}",
        str(found["launches"]),
        f"{found['bytes_touched_per_image'] / 1e6:.2f}",
        f"{found['bytes_issued_per_image'] / 1e6:.1f}",
        f"{100 * found['useful_mac_share']:.1f} %",
        str(found.get("bank_conflicts", "")),
    ]
