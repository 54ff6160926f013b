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
)

ALIKE = ("--dropout", "0", "--dropout-aux", "0", "--epochs", "1", "--synthetic-size", "16")


def finish(process: "subprocess.Popen[str]") -> str:
    out, error = process.communicate(timeout=900)
    assert process.returncode == 0, out + error
    return out


# Rounding grows from step to step; in float64 there is hardly any.
IN_DOUBLE = """
import sys
from dataclasses import replace
from inception_ext.cli import main
from inception_ext.training import batches, loop

build, collate = loop.build_network, batches.collate

def collate_doubles(samples):
    batch = collate(samples)
    return replace(batch, images=batch.images.double())

loop.build_network = lambda *args, **options: build(*args, **options).double()
batches.collate = collate_doubles
sys.exit(main(sys.argv[1:]))
"""


def run_script(folder: Path, code: str, *options: str, torchrun: int) -> str:
    """Trains by a script of its own; ``torchrun`` processes."""
    script = folder.with_suffix(".py")
    script.write_text(code)
    launcher = command(torchrun=torchrun)[: -len(["-m", "inception_ext"])]
    done = subprocess.run(
        [*launcher, str(script), *SMALL, *options, "--output-dir", str(folder)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_two_processes_are_one_on_the_joined_batch(variant, tmp_path):
    options = (*ALIKE, "--variant", variant)
    run_script(tmp_path / "one", IN_DOUBLE, *options, "-b", "8", torchrun=0)
    both = run_script(tmp_path / "two", IN_DOUBLE, *options, "-b", "4", "--sync-bn", torchrun=2)
    assert "of 4 x 2 images" in both

    rows = [steps(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 2
    for one, two in zip(*rows, strict=True):
        assert (one.pop("grad_norm"), two.pop("grad_norm")) == (None, None)
        assert two == pytest.approx(one, rel=1e-8)
    tests = [epochs(tmp_path / name)[0]["test"] for name in ("one", "two")]
    assert tests[0]["images"] == 3
    assert tests[1] == pytest.approx(tests[0], rel=1e-6)

    one_model, two_model = (last_checkpoint(tmp_path / name)["model"] for name in ("one", "two"))
    for key, value in one_model.items():
        assert value.dtype in (torch.float64, torch.int64)
        torch.testing.assert_close(two_model[key], value, rtol=1e-6, atol=1e-9, msg=key)


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
    parts = tmp_path / "parts"
    stopped = run_script(parts, STOP_ONE, *options, torchrun=2)
    assert "stopped by another process after step 2" in stopped
    assert last_checkpoint(parts)["step"] == 2
    assert "resuming after step 2" in finish(start(parts, *options, "--resume", torchrun=2))
    finish(whole)
    assert_same_runs(tmp_path / "whole", parts)
