"""What the commands share on the terminal: errors in one line, headings, a progress bar."""

import importlib
import sys
from types import TracebackType
from typing import Any

from inception_ext._torchvision import import_torchvision

__all__ = ["CommandError", "Progress", "heading", "require", "say"]


class CommandError(Exception):
    """Ends a command with exit status 1 and its text as the one line of explanation."""


def require(extra: str, **modules: str) -> None:
    """Makes sure that optional packages can be imported.

    Args:
        extra: the extra of this package that brings them.
        **modules: name on PyPI by name of the module, say ``skimage="scikit-image"``.

    Raises:
        CommandError: names those that are missing, and the command that installs them.
    """
    missing = []
    for module, package in modules.items():
        try:
            if module == "torchvision":
                import_torchvision()
            else:
                importlib.import_module(module)
        except ImportError:
            missing.append(package)
    if missing:
        raise CommandError(
            f'{", ".join(missing)} missing; install with: pip install "inception_ext[{extra}]"'
        )


def say(text: str = "") -> None:
    """Prints a line, at once."""
    print(text, flush=True)


def heading(text: str) -> None:
    say(f"\n{text}\n{'-' * len(text)}")


class Progress:
    """A progress bar on a terminal; elsewhere only the lines given to :meth:`line`.

    Args:
        total, done: steps in all, and those of them that are behind.
        label: stands before the bar.
        shown: False for no bar anywhere.
        stream: default: the standard output.
    """

    def __init__(
        self, total: int, label: str, *, done: int = 0, shown: bool = True, stream: Any = None
    ) -> None:
        self._bar: Any = None
        self._stream = stream or sys.stdout
        self.is_terminal = shown and self._stream.isatty()
        if self.is_terminal:
            try:
                from tqdm import tqdm
            except ImportError:
                self.is_terminal = False
                return
            self._bar = tqdm(total=total, initial=done, desc=label, leave=False, file=self._stream)

    def step(self, note: str) -> None:
        """One of ``total`` steps is done; ``note`` stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
