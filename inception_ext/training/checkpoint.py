"""The state of a run on disk: tensors and plain types, written beside and renamed."""

import os
from pathlib import Path
from typing import Any

import torch

from inception_ext._console import CommandError, say
from inception_ext._files import replace_file

__all__ = ["newest", "prune", "read", "save"]

FORMAT = "inception_ext.training"
VERSION = 1


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08}.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint; the file of that name, if any, stays until the new one is complete.

    Raises:
        CommandError: it cannot be written.
    """

    def write(file: Any) -> None:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
        except RuntimeError as error:  # torch's own writer gives no OSError
            cause = error.__cause__ or error.__context__
            raise cause if isinstance(cause, OSError) else OSError(str(error)) from error

    replace_file(path, write)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU.

    Raises:
        CommandError: it is missing, broken, or not from a training run.
    """
    if not path.is_file():
        raise CommandError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle may raise anything at all
        what = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f"cannot read the checkpoint {path}: {what}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CommandError(f"{path} is no checkpoint of a training run; --weights takes others")
    if content["version"] > VERSION:
        raise CommandError(f"{path} comes from a newer version of inception_ext")
    return content


def all_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a folder that can be read, and its content.

    Raises:
        CommandError: there is none.
    """
    found = all_in(folder)
    if not found:
        raise CommandError(f"--resume: no checkpoint in {folder}")
    for path in reversed(found[1:]):
        try:
            return path, read(path)
        except CommandError as error:
            say(f"{error}; taking the one before")
    return found[0], read(found[0])


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest."""
    for path in all_in(folder)[:-keep]:
        os.unlink(path)
