"""What a training step costs on the CUDA kernels, in counters of the emulator."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_devices import needs_emulator

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def train_counters(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("train_counters")


@needs_emulator
@pytest.mark.slow
def test_a_step_at_224(train_counters):
    """The figures of one image; per image they hardly depend on the batch."""
    found = train_counters.count(1, torch.float16)
    assert found["forward_launches_per_module"] <= 5
    assert found["backward_launches_per_module"] <= 10
    assert 60e6 < found["train_bytes_touched_per_image"] <= 80e6
    assert 8e6 < found["saved_bytes_per_image"] <= 11e6
    assert found["bitwise_repeatable"]
    assert found["useful_mac_share"] > 0.9


@needs_emulator
def test_the_command_line(tmp_path):
    sys.path.insert(0, str(FOLDER))
    try:
        counters = importlib.import_module("counters")
    finally:
        sys.path.remove(str(FOLDER))
    file = tmp_path / "found.json"
    command = ["--train", "--batch", "2", "--size", "64", "--dtype", "float16", "--json", str(file)]
    assert counters.main(command) == 0
    found = json.loads(file.read_text())
    assert found["train"] and found["batch"] == 2 and found["launches"] > 100
    keys = {
        "forward_launches_per_module",
        "backward_launches_per_module",
        "train_bytes_touched_per_image",
        "saved_bytes_per_image",
        "bitwise_repeatable",
    }
    assert keys <= found.keys()
