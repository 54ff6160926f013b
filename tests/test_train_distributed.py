"""Two processes on gloo train as one does on the joined batch, and stop and go on together."""

import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import (
    SMALL,
    assert_same_runs,
    command,
    environment,
    epochs,
    last_checkpoint,
    start,
    steps,
    train,
)

ALIKE = ("--dropout", "0", "--dropout-aux", "0", "--epochs", "1", "--synthetic-size", "16")


def finish(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=900)
    assert process.returncode == 0, out + error
    return out


@pytest.mark.parametrize(("variant", "size"), [("torchvision", "64"), ("bvlc", "32")])
def test_two_processes_are_one_on_the_joined_batch(variant, size, tmp_path):
    options = (*ALIKE, "--lr", "1e-4", "--variant", variant, "--train-crop-size", size)
    two = start(tmp_path / "two", *options, "-b", "4", "--sync-bn", torchrun=2)
    assert train(tmp_path / "one", *options, "-b", "8") == 0
    assert "of 4 x 2 images" in finish(two)

    rows = [steps(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 2
    for one, both in zip(*rows, strict=True):
        assert both["images"] == one["images"] == 8
        for name in ("loss", "main", "aux1", "aux2"):
            # The first step sees the same weights; the next one amplifies rounding.
            limit = 1e-5 if one["step"] == 0 else 2e-4
            assert both[name] == pytest.approx(one[name], rel=limit), one["step"]
    tests = [epochs(tmp_path / name)[0]["test"] for name in ("one", "two")]
    assert tests[0]["images"] == tests[1]["images"] == 3
    assert tests[1]["loss_main"] == pytest.approx(tests[0]["loss_main"], rel=1e-2)

    one, two_models = (last_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for key, value in one.items():
        if value.is_floating_point():
            scale = value.abs().max().item() + 1e-6
            assert (two_models[key] - value).abs().max().item() < 1e-2 * scale, key
        else:
            assert torch.equal(two_models[key], value), key


STOP_ONE = """
import os, signal, sys
from inception_ext.cli import main
from inception_ext.training import loop

report = loop.Trainer._report

def report_then_signal(self, row, bar):
    report(self, row, bar)
    if self.state.step == 1 and self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)

loop.Trainer._report = report_then_signal
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_to_one_of_two_stops_both_and_they_go_on(tmp_path: Path):
    """Each process has its own dropout; both come back to where they were."""
    options = ("--epochs", "1", "-b", "2")
    whole = start(tmp_path / "whole", *options, torchrun=2)
    script = tmp_path / "stop_one.py"
    script.write_text(STOP_ONE)
    launcher = command(torchrun=2)[: -len(["-m", "inception_ext"])]
    parts = tmp_path / "parts"
    stopped = subprocess.run(
        [*launcher, str(script), *SMALL, *options, "--output-dir", str(parts)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "stopped by another process after step 2" in stopped.stdout
    assert last_checkpoint(parts)["step"] == 2
    assert "resuming after step 2" in finish(start(parts, *options, "--resume", torchrun=2))
    finish(whole)
    assert_same_runs(tmp_path / "whole", parts)
