"""A training run that is killed, stopped, or out of luck goes on with the same numbers."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_runs, last_checkpoint, start, steps, train

from inception_ext.training import loop

# All that keeps a state: averaging, mixing, clipping, the scaler of fp16, a warm-up.
RICH = (
    *("--model-ema", "--model-ema-steps", "2", "--model-ema-decay", "0.9", "--mixup-alpha", "0.2"),
    *("--cutmix-alpha", "1", "--clip-grad-norm", "5", "--lr-warmup-epochs", "0.5"),
    *("--random-erase", "0.5", "--auto-augment", "ta_wide", "--save-every", "2"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *RICH) == 0
    assert len(steps(folder)) == 8
    return folder


def wait_for_steps(folder: Path, process, count: int) -> None:
    deadline = time.monotonic() + 600  # of a machine that others use too
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "steps.csv").exists() and len(steps(folder)) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"never came to step {count}: {process.communicate()}")


def test_after_sigkill(whole, tmp_path):
    process = start(tmp_path, *RICH)
    wait_for_steps(tmp_path, process, 6)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    saved = last_checkpoint(tmp_path)["step"]
    assert 4 <= saved < 8
    with open(tmp_path / "steps.csv", "a") as file:
        file.write("7,1,0.00")  # cut off
    assert train(tmp_path, *RICH, "--resume") == 0
    assert_same_runs(whole, tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_in_the_middle_of_an_epoch(name, whole, tmp_path, monkeypatch, capsys):
    report = loop.Trainer._report

    def report_then_signal(self, row, bar):
        report(self, row, bar)
        if self.state.step == 5:
            os.kill(os.getpid(), getattr(signal, name))

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(loop.Trainer, "_report", report_then_signal)
    assert train(tmp_path, *RICH) == 0
    assert f"stopped by {name} after step 6" in capsys.readouterr().out
    assert len(steps(tmp_path)) == last_checkpoint(tmp_path)["step"] == 6
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before

    monkeypatch.undo()
    if name == "SIGTERM":
        assert train(tmp_path, *RICH, "--resume") == 0
        assert_same_runs(whole, tmp_path)


def test_signal_in_the_test_of_an_epoch(whole, tmp_path, monkeypatch):
    evaluate = loop.evaluate

    def signal_then_evaluate(*args, **kwargs):
        if not kwargs["stop"]():  # a second signal ends the process
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", signal_then_evaluate)
    assert train(tmp_path, *RICH) == 0
    saved = last_checkpoint(tmp_path)
    assert (saved["step"], saved["epoch"], saved["step_in_epoch"]) == (4, 0, 4)
    monkeypatch.undo()
    assert train(tmp_path, *RICH, "--resume") == 0
    assert_same_runs(whole, tmp_path)


def test_sigterm_to_a_process_with_workers(whole, tmp_path):
    """The signal goes to the whole group, as a terminal or a batch system sends it."""
    import subprocess

    from training_runs import SMALL, command, environment

    process = subprocess.Popen(
        command(*SMALL, "--output-dir", str(tmp_path), *RICH, "--workers", "1"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_steps(tmp_path, process, 1)
    os.killpg(process.pid, signal.SIGTERM)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert "stopped by SIGTERM" in out
    assert error == ""
    done = last_checkpoint(tmp_path)["step"]
    assert done == len(steps(tmp_path)) < 8
    assert steps(tmp_path) == steps(whole)[:done]  # workers change nothing


def test_scaler_of_fp16(tmp_path, monkeypatch):
    options = ("--amp", "fp16", "--epochs", "1")
    assert train(tmp_path / "whole", *options) == 0
    monkeypatch.setattr(loop.Trainer, "_stopping", lambda self: self.state.step == 2)
    assert train(tmp_path / "parts", *options) == 0
    scaler = last_checkpoint(tmp_path / "parts")["scaler"]
    assert scaler["scale"] < 2**16 or scaler["_growth_tracker"] == 2
    monkeypatch.undo()
    assert train(tmp_path / "parts", *options, "--resume") == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_checkpoints_are_tensors_and_plain_types(whole):
    def walk(item, where):
        if isinstance(item, dict):
            for key, value in item.items():
                assert type(key) in (str, int), where
                walk(value, f"{where}[{key!r}]")
        elif type(item) in (list, tuple):
            for value in item:
                walk(value, where)
        else:
            assert item is None or type(item) in (torch.Tensor, int, float, bool, str), where

    for path in whole.glob("*.pt"):
        walk(torch.load(path, weights_only=True), path.name)
    assert not list(whole.glob(".*")), "temporary files"
    assert len(list(whole.glob("checkpoint-*.pt"))) == 2


def test_resume_from_a_file_into_another_folder(whole, tmp_path, capsys):
    path = min(whole.glob("checkpoint-*.pt"))
    assert train(tmp_path, *RICH, "--resume", str(path)) == 0
    first = int(path.stem.rpartition("-")[2])
    assert steps(tmp_path) == steps(whole)[first:]
    assert f"resuming after step {first}" in capsys.readouterr().out


def test_a_broken_newest_checkpoint_is_passed_over(whole, tmp_path, capsys):
    paths = sorted(whole.glob("checkpoint-*.pt"))
    for path in paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / paths[-1].name
    broken.write_bytes(broken.read_bytes()[:1000])
    assert train(tmp_path, *RICH, "--resume") == 0
    text = capsys.readouterr().out
    assert f"cannot read the checkpoint {broken}" in text
    assert "taking the one before" in text
    assert steps(tmp_path) == steps(whole)[int(paths[0].stem.rpartition("-")[2]) :]


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_full_disk_loses_nothing(whole, tmp_path, capsys):
    """A limit on the size of files stands for the disk."""
    path = max(whole.glob("checkpoint-*.pt"))
    kept = tmp_path / path.name
    kept.write_bytes(path.read_bytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kept.stat().st_size // 2, limits[1]))
    try:
        assert train(tmp_path, *RICH, "--resume", "--epochs", "3") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = one_line(capsys)
    assert "cannot write" in error
    assert "File too large" in error
    assert f"the newest checkpoint is {kept}" in error
    assert kept.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [kept.name, "steps.csv"]
    assert steps(tmp_path)[-1]["step"] == 9


def test_a_full_disk_for_the_metrics(tmp_path, monkeypatch, capsys):
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr("inception_ext.training.metrics.open", lambda *a, **k: full, raising=False)
    assert train(tmp_path) == 1
    assert "No space left on device" in one_line(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume",), "--resume: no checkpoint in {0}"),
        (("--resume", "{0}/none.pt"), "no checkpoint at {0}/none.pt"),
        (("--weights", "{0}/none.pt"), "--weights: no checkpoint at {0}/none.pt"),
    ],
)
def test_missing_files(options, message, tmp_path, capsys):
    assert train(tmp_path, *(option.format(tmp_path) for option in options)) == 1
    assert message.format(tmp_path) in one_line(capsys)


def test_what_does_not_fit(whole, tmp_path, capsys):
    path = str(max(whole.glob("checkpoint-*.pt")))
    assert train(tmp_path, "--resume", path, "--num-classes", "4") == 1
    assert "was trained on 3 classes, the data has 4" in one_line(capsys)
    assert train(tmp_path, "--resume", path, "--variant", "bvlc") == 1
    assert f"{path} does not fit this network" in one_line(capsys)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    assert train(tmp_path, "--resume", str(tmp_path / "other.pt")) == 1
    assert "is no checkpoint of a training run" in one_line(capsys)
    assert train(whole) == 1
    assert f"{whole} holds a run already" in one_line(capsys)


def test_other_settings_are_named(whole, tmp_path, capsys):
    path = str(min(whole.glob("checkpoint-*.pt")))
    assert train(tmp_path, *RICH, "--resume", path, "--lr", "0.02") == 0
    assert "lr was 0.01, is 0.02" in capsys.readouterr().out
