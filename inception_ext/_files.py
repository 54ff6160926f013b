"""Files that are either there in full or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inception_ext._console import CommandError

__all__ = ["make_folder", "replace_file", "write_text"]


def replace_file(path: Path, write: Callable[[Any], None]) -> None:
    """Calls ``write`` with a binary file beside ``path`` and renames that to ``path``.

    Whatever goes wrong, and whenever the process dies, ``path`` holds what it held.

    Raises:
        CommandError: it cannot be written, say because the disk is full.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise CommandError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_text(path: Path, text: str) -> None:
    """:func:`replace_file` with a text in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where it is not there.

    Raises:
        CommandError: that cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make the folder {path}: {error.strerror}") from error
