"""Architectures that code was compiled for, and those of devices."""

import re
from collections.abc import Sequence

__all__ = ["covering_architecture"]


def covering_architecture(architectures: Sequence[str], capability: str) -> str | None:
    """Which of a binary's code objects a device runs, or None.

    Machine code runs on its own major version from its minor version up (``sm_80`` on 8.6), PTX
    on everything from its version up; with the suffix ``a`` either runs on its very version only,
    with ``f`` on its family, which is taken as its major version.

    Args:
        architectures: such as ``["sm_80", "sm_90a", "compute_120"]``.
        capability: of the device, such as ``"9.0"``.
    """
    major, minor = (int(part) for part in capability.split("."))
    best: tuple[bool, int, str] | None = None
    for name in architectures:
        parsed = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not parsed:
            continue
        kind, its_major, its_minor, suffix = (
            parsed[1],
            int(parsed[2]),
            int(parsed[3]),
            parsed[4],
        )
        if suffix == "a":
            runs = (its_major, its_minor) == (major, minor)
        elif suffix == "f" or kind == "sm":
            runs = its_major == major and its_minor <= minor
        else:
            runs = (its_major, its_minor) <= (major, minor)
        if runs:  # machine code before PTX, then the newest
            rank = (kind == "sm", its_major * 10 + its_minor, name)
            best = rank if best is None else max(best, rank)
    return best[2] if best else None
