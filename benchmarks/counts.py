"""What the emulator has counted, from the result files of counters.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import results

__all__ = ["HEADER", "KEYS", "TRAINING_HEADER", "for_batch", "read", "row", "training_row"]

KEYS = ("launches", "bytes_touched_per_image", "bytes_issued_per_image", "useful_mac_share")
HEADER = (
    *("frozen network", "launches", "MB touched an image", "MB issued an image"),
    *("useful MACs", "bank conflicts"),
)
_TRAINING_KEYS = (
    *("forward_launches_per_module", "backward_launches_per_module", "useful_mac_share"),
    *("train_bytes_touched_per_image", "saved_bytes_per_image", "bitwise_repeatable"),
)
TRAINING_HEADER = (
    *("training step", "launches of a module", "MB touched an image", "MB saved an image"),
    *("useful MACs", "bank conflicts", "repeats bit for bit"),
)
_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def read(path: Path, *, training: bool = False) -> Mapping[str, Any] | None:
    """A file of counters.py, of inference or of training; or None where it is something else."""
    found = json.loads(path.read_text(encoding="utf-8"))
    keys = _TRAINING_KEYS if training else KEYS
    return found if all(key in found for key in ("batch", "dtype", *keys)) else None


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


def training_row(found: Mapping[str, Any]) -> list[str]:
    """Cells under TRAINING_HEADER."""
    launches = (found[f"{way}_launches_per_module"] for way in ("forward", "backward"))
    return [
        f"{found['dtype']}, batch {found['batch']}",
        " + ".join(f"{count:g}" for count in launches),
        f"{found['train_bytes_touched_per_image'] / 1e6:.1f}",
        f"{found['saved_bytes_per_image'] / 1e6:.2f}",
        f"{100 * found['useful_mac_share']:.1f} %",
        str(found.get("bank_conflicts", "")),
        "yes" if found["bitwise_repeatable"] else "no",
    ]
