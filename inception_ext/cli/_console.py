"""What the commands share on the terminal: errors in one line, headings, a progress bar."""

import importlib
import sys
from types import TracebackType
from typing import Any

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
    """A progress bar on a terminal; elsewhere only the lines given to :meth:`line`."""

    def __init__(self, total: int, label: str) -> None:
        self._bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, leave=False, file=sys.stdout)

    def step(self, note: str) -> None:
        """One of ``total`` steps is done; ``note`` stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def line(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            say(text)

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
