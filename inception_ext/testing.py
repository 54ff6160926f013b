"""Runs the CUDA kernels without a GPU: the switch to the SIMT emulator, for tests.

    from inception_ext.testing import emulated

    with emulated(seed=3) as launches:
        model(x).sum().backward()
    print([launch["kernel"] for launch in launches])

Inside the block, tensors of the CPU are served the way CUDA tensors are: the gate, the autograd
functions and the modules take the CUDA ops where there are some, and these run their kernels on
the emulator (docs/emulator.md). A bug that the emulator finds is a RuntimeError that says where.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inception_ext import _library

__all__ = ["emulated", "emulator_error"]

_error: str | None = None
try:
    from inception_ext import _emulator  # type: ignore[attr-defined]
except ImportError as error:
    _error = str(error)
else:
    _library.register("inception_ext_emulated")


def emulator_error() -> str | None:
    """Why there is no emulator in this installation, or None."""
    return _error


@contextmanager
def emulated(
    seed: int = 0,
    checks: bool = True,
    counting: bool = True,
    workers: int = 0,
    **device: int,
) -> Iterator[list[dict[str, Any]]]:
    """Serves CPU tensors with the CUDA kernels, for the whole process, within a block.

    Args:
        seed: Decides in which order blocks, warps and lanes take turns. A kernel whose result
            depends on it has a race.
        checks: Whether to look for races, accesses out of bounds and unwritten values.
        counting: Whether to count.
        workers: Host threads that run blocks at the same time; 0: one a core.
        **device: Of the device: ``capability`` (90; 75 has neither cp.async nor the larger
            products), ``multiprocessors`` (132), ``shared_limit`` (bytes a block, 227 KiB).

    Yields:
        A list. When the block ends it gets one dict a launch, in order: ``kernel``, ``op``,
        ``grid``, ``block``, ``shared_bytes``, ``bytes_touched`` (global memory, each byte once),
        ``touched`` (the same by tensor, read and written), ``bytes_read`` and ``bytes_written``
        (as issued), ``useful_macs``, ``issued_macs``, ``barriers``, ``shared_passes``,
        ``bank_conflicts``, ``conflict_places``.

    Raises:
        RuntimeError: The package was built without the emulator (``INCEPTION_EXT_EMULATOR=1``).
    """
    if _error is not None:
        raise RuntimeError(
            f"no emulator in this build ({_error}); INCEPTION_EXT_EMULATOR=1 at build time adds it"
        )
    launches: list[dict[str, Any]] = []
    settings = _emulator.get_settings()
    _emulator.take_launches()
    _emulator.set_settings(seed=seed, checks=checks, counting=counting, workers=workers, **device)
    before = _library.set_emulated(True)
    try:
        yield launches
    finally:
        _library.set_emulated(before)
        _emulator.set_settings(**settings)
        launches += _emulator.take_launches()
