"""Small training runs for the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import inception_ext
from inception_ext.cli import main
from inception_ext.training.metrics import read_steps

# 4 steps an epoch of 4 images of 32 x 32; one thread everywhere, so that numbers can be compared.
SMALL = (
    *("train", "--synthetic", "--synthetic-size", "16", "--num-classes", "3", "-b", "4"),
    *("--train-crop-size", "32", "--lr", "0.01", "--epochs", "2", "--threads", "1"),
)


def train(folder: Path, *options: str) -> int:
    """Trains within this process; returns the exit status."""
    threads = torch.get_num_threads()
    try:
        return main([*SMALL, "--output-dir", str(folder), *options])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)


def command(*options: str, torchrun: int = 0) -> list[str]:
    """A command line of another process, or of ``torchrun`` with so many."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    return [*launcher, "-m", "inception_ext", *options]


def environment() -> dict[str, str]:
    root = str(Path(inception_ext.__file__).parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(folder: Path, *options: str, torchrun: int = 0) -> "subprocess.Popen[str]":
    """Trains in another process."""
    return subprocess.Popen(
        command(*SMALL, "--output-dir", str(folder), *options, torchrun=torchrun),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of steps.csv without the one column that a clock decides."""
    rows = read_steps(folder / "steps.csv")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def epochs(folder: Path) -> list[dict[str, Any]]:
    facts = json.loads((folder / "epochs.json").read_text())["epochs"]
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in facts]


def last_checkpoint(folder: Path) -> dict[str, Any]:
    path = max(folder.glob("checkpoint-*.pt"))
    return torch.load(path, weights_only=True)


def assert_same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Equality bit by bit, through dicts and lists of tensors and plain values."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_runs(a: Path, b: Path) -> None:
    """The same numbers in every step and every epoch, and the same state at the end."""
    assert steps(a) == steps(b)
    assert epochs(a) == epochs(b)
    states = [last_checkpoint(folder) for folder in (a, b)]
    for state in states:
        for epoch in state["epochs"]:
            del epoch["seconds"]
    assert_same(*states)


def make_images(root: Path, classes: int = 2, each: int = 5, size: int = 40) -> list[Path]:
    """PNG files, one folder a class."""
    from PIL import Image

    random = np.random.default_rng(0)
    paths = []
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = random.integers(0, 256, (size, size + 8, 3), dtype=np.uint8)
            paths.append(folder / f"{i}.png")
            Image.fromarray(pixels).save(paths[-1])
    return paths
