"""Compiles emulated kernels with the host compiler, once for all test workers."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_toolkit import find_headers

ROOT = Path(__file__).resolve().parent.parent
EMULATOR = sorted((ROOT / "csrc" / "emulator").glob("*.cpp"))
CONTROLS = {"controls.cpp", "module.cpp"}  # the ones that need Python
BUILT = ROOT / "build" / "ninja-emulator"  # where setup.py leaves the objects of the emulator
HEADERS = find_headers()
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def supports_x86_64_v3() -> bool:
    """Whether this processor runs AVX2, FMA and F16C code."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return {"avx2", "fma", "f16c", "bmi2", "movbe"} <= words


def flags() -> list[str]:
    """What every source is compiled with."""
    return [
        "-std=c++20",
        "-O3",
        *(["-march=x86-64-v3"] if supports_x86_64_v3() else []),
        "-fPIC",
        *WARNINGS,
        "-DINCEPTION_EXT_EMULATE",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        str(HEADERS),
    ]


def python_flags() -> list[str]:
    import pybind11

    paths = (pybind11.get_include(), sysconfig.get_paths()["include"])
    return ["-fvisibility=hidden", *(flag for path in paths for flag in ("-isystem", path))]


def digest(command: Sequence[str]) -> str:
    """Of the compiler, its flags and everything that a source may include."""
    text = hashlib.sha256(repr((command, sys.version)).encode())
    for folder in ("csrc/emulator", "csrc/kernels", "tests/cpp"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file():
                text.update(str(path).encode() + path.read_bytes())
    return text.hexdigest()[:16]


def built_objects(sources: Sequence[Path]) -> list[Path] | None:
    """The objects that the build left of sources in csrc; None where it has not seen the latest."""
    folders = (ROOT / "csrc" / name for name in ("emulator", "kernels"))
    read = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    objects = [BUILT / f"{path.relative_to(ROOT)}.o" for path in sources]
    linked = [path.stat().st_mtime for path in BUILT.glob("_emulator*.so")]
    latest = max(path.stat().st_mtime for path in read)
    if all(path.exists() for path in objects) and linked and min(linked) > latest:
        return objects
    return None


def build_library(
    name: str,
    source: Path,
    extra: Sequence[str] = (),
    python: bool = False,
    kernels: Sequence[str] = (),
) -> Path:
    """A shared library of one source and the emulator.

    Args:
        extra: Flags for all of it, the emulator too.
        python: Whether the source is a Python module with the emulator's controls.
        kernels: Sources in csrc/kernels that go with it.
    """
    command = [str(COMPILER), *flags(), *extra]
    used = [
        *(path for path in EMULATOR if path.name not in CONTROLS),
        *(ROOT / "csrc" / "kernels" / kernel for kernel in kernels),
        *(path for path in EMULATOR if python and path.name == "controls.cpp"),
    ]
    objects = None if extra else built_objects(used)
    if objects is None:
        compiled = build_once(f"objects-of-{name}", used, [*command, *python_flags()])
        objects = list(compiled.glob("*.o"))
    if python:
        command += python_flags()
    return build_once(name, [source], command, objects) / f"{name}.so"


def build_once(
    name: str, sources: Sequence[Path], command: list[str], objects: Sequence[Path] | None = None
) -> Path:
    """A folder with the objects of the sources and, given more objects, the library of all."""
    folder = ROOT / "build" / "tests" / f"{name}-{digest(command)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker builds, the others wait
        if folder.exists():
            return folder
        for stale in folder.parent.glob(f"{name}-{'[0-9a-f]' * 16}"):
            shutil.rmtree(stale)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

        def compile_one(path: Path) -> Path:
            target = partial / f"{path.name}.o"
            run([*command, "-c", "-x", "c++", str(path), "-o", str(target)])
            return target

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            compiled = list(pool.map(compile_one, sources))
        if objects is not None:
            link = [str(COMPILER), "-shared", *map(str, [*compiled, *objects])]
            run([*link, "-o", str(partial / f"{name}.so"), "-lpthread", "-ldl"])
        partial.rename(folder)
    return folder


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
