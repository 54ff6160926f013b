"""What a run leaves to read: a line of CSV a step, JSON of the epochs, TensorBoard by choice."""

import contextlib
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inception_ext._console import CommandError, require
from inception_ext._files import replace_file, write_text
from inception_ext.training.network import HEADS

__all__ = ["COLUMNS", "Metrics", "read_steps"]

COLUMNS = (
    "step",
    "epoch",
    "lr",
    "loss",
    *HEADS,
    *(f"accuracy_{head}" for head in HEADS),
    "grad_norm",
    "images",
    "seconds",
)


class Metrics:
    """Writes ``steps.csv`` and ``epochs.json`` in a folder.

    Args:
        folder: of the run.
        step: of a run that goes on; lines from there on, which a killed run may have left, go.
        tensorboard: also write event files, below ``tensorboard/``.

    Raises:
        CommandError: the folder cannot be written to, or TensorBoard is missing.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.steps_path, self.epochs_path = folder / "steps.csv", folder / "epochs.json"
        self._board: Any = None
        if tensorboard:
            require("tensorboard", tensorboard="tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        kept = [row for row in read_steps(self.steps_path) if row["step"] < step] if step else []
        lines = io.StringIO()
        writer = csv.writer(lines)
        writer.writerow(COLUMNS)
        writer.writerows([_text(row[name]) for name in COLUMNS] for row in kept)
        replace_file(self.steps_path, lambda file: file.write(lines.getvalue().encode()))
        # Line by line: what a killed run has done can be read.
        self._file = open(self.steps_path, "a", newline="", buffering=1)  # noqa: SIM115
        self._writer = csv.writer(self._file)

    def step(self, row: Mapping[str, Any]) -> None:
        """Raises: CommandError: the disk is full."""
        try:
            self._writer.writerow([_text(row[name]) for name in COLUMNS])
        except OSError as error:
            raise CommandError(f"cannot write {self.steps_path}: {error.strerror}") from error
        if self._board is not None:
            for name in COLUMNS[2:]:
                if row[name] is not None:
                    self._board.add_scalar(f"step/{name}", row[name], row["step"])

    def epochs(self, facts: Mapping[str, Any]) -> None:
        """Writes the JSON anew: the whole of ``facts``, whose entry ``epochs`` is a list."""
        write_text(self.epochs_path, json.dumps(facts, indent=2) + "\n")
        if self._board is not None and facts["epochs"]:
            last = facts["epochs"][-1]
            for part in ("test", "test_ema"):
                for name, value in (last.get(part) or {}).items():
                    self._board.add_scalar(f"{part}/{name}", value, last["epoch"])
            self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self._file.close()
        if self._board is not None:
            self._board.close()


def _text(value: Any) -> str:
    return "" if value is None else repr(value)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a ``steps.csv``; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    numbers = []
    for row in rows[1:]:
        try:
            values = [float(text) if text else None for text in row]
        except ValueError:
            continue  # cut off by a kill
        if len(values) == len(COLUMNS) and None not in values[:2]:
            record: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
            for name in ("step", "epoch", "images"):
                record[name] = int(record[name])
            numbers.append(record)
    return numbers
