"""What the forward pass of a frozen GoogLeNet costs, counted: benchmarks/counters.py."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_devices import needs_emulator

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def counters(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("counters")


def check_limits(found: dict[str, Any]) -> None:
    """Those that do not depend on the batch."""
    assert found["launches"] == 24
    assert found["launches_per_module"] == 2
    assert found["stem_bytes_per_image"] <= 1.6e6
    assert found["bank_conflicts"] == 0, found["bank_conflict_places"]


@needs_emulator
def test_a_single_image(counters):
    found = counters.count(1, torch.float16)
    check_limits(found)
    assert found["of_each_launch"][0]["modules"] == "conv1 + maxpool1"
    # The image, and what the second launch reads of the first one's output.
    x, y = 3 * 224 * 224, 64 * 56 * 56
    assert found["of_each_launch"][0]["bytes_touched"] == 2 * (x + y)


@needs_emulator
@pytest.mark.slow
def test_a_batch_of_eight(counters):
    found = counters.count(8, torch.float16)
    check_limits(found)
    assert found["bytes_touched_per_image"] <= 15.0e6
    assert found["bytes_issued_per_image"] >= found["bytes_touched_per_image"]
    assert found["useful_mac_share"] >= 0.85


@needs_emulator
def test_the_command(counters, tmp_path, capsys):
    target = tmp_path / "results" / "counters.json"
    arguments = ["--batch", "2", "--size", "32", "--dtype", "bfloat16", "--json", str(target)]
    assert counters.main(arguments) == 0
    result = json.loads(target.read_text())
    assert result["schema"] == "inception_ext.counters" and result["schema_version"] == 1
    assert {"date", "commit", "machine", "versions", "batch", "dtype", "size"} <= set(result)
    text = capsys.readouterr().out
    for key in (
        *("launches", "launches_per_module", "bytes_touched_per_image", "stem_bytes_per_image"),
        *("bytes_issued_per_image", "useful_mac_share", "bank_conflicts"),
    ):
        assert key in result and f"\n{key} " in text
    assert len(result["of_each_launch"]) == result["launches"] == 24
    assert str(BENCHMARKS) not in target.read_text()


def test_weights_do_not_count(counters):
    touched = [
        {"operand": "x", "read": 100, "written": 0},
        {"operand": "weight", "read": 1000, "written": 0},
        {"operand": "bias1", "read": 10, "written": 0},
        {"operand": "y", "read": 0, "written": 60},
        {"operand": "partials", "read": 4, "written": 4},
    ]
    launch = {
        "op": "conv_group",
        "grid": [1, 1, 1],
        "touched": touched,
        "bytes_read": 1500,
        "bytes_written": 64,
        "useful_macs": 30,
        "issued_macs": 40,
        "bank_conflicts": 2,
        "conflict_places": {"tile.cuh:7": 2},
    }
    names = ["conv1", "conv3 + maxpool2", "inception3a", "inception3a", "inception3b"]
    found = counters.summarize([launch] * 5, names, batch=2)
    assert found["launches"] == 5 and found["launches_per_module"] == 2
    assert found["bytes_touched_per_image"] == 5 * 168 / 2
    assert found["stem_bytes_per_image"] == 2 * 168 / 2
    assert found["bytes_issued_per_image"] == 5 * 1564 / 2
    assert found["useful_mac_share"] == 0.75
    assert found["bank_conflicts"] == 10 and found["bank_conflict_places"] == {"tile.cuh:7": 10}


@pytest.mark.parametrize("wrong", [["--batch", "0"], ["--dtype", "float64"]])
def test_bad_options(counters, wrong):
    with pytest.raises(SystemExit) as stop:
        counters.parse(wrong)
    assert stop.value.code == 2
