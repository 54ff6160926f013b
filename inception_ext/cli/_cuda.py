"""What is found of CUDA on this machine, with or without a torch that can use it."""

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["covering_architecture", "devices", "driver", "nvcc"]


def nvcc() -> dict[str, str] | None:
    """``path`` and ``version`` of the nvcc that a build would use, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
    if not found and not home:
        found = shutil.which("/usr/local/cuda/bin/nvcc")
    if not found:
        return None
    release = re.search(r"release (\d+\.\d+)", _output([found, "--version"]))
    return {"path": found, "version": release[1] if release else "unknown"}


def driver() -> dict[str, str | None] | None:
    """``version`` of the kernel driver and the newest ``cuda`` that it runs, or None."""
    module = Path("/proc/driver/nvidia/version")
    text = module.read_text() if module.exists() else ""
    version = re.search(r"Kernel Module\S*(?:\s+for \S+)?\s+(\d+[\d.]+)", text)
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int(0)
        failed = libcuda.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value == 0
    except (OSError, AttributeError):
        failed = True
    if failed and not version:
        return None
    cuda = None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"
    return {"version": version[1] if version else None, "cuda": cuda}


def devices() -> list[dict[str, Any]]:
    """``name``, ``capability`` (as in "9.0") and ``memory_gib`` of each GPU."""
    if torch.cuda.is_available():
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
            for device in found
        ]
    # A torch without CUDA cannot tell; the driver's own tool can.
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total"]
    rows = _output([*query, "--format=csv,noheader,nounits"]).splitlines()
    fields = [[field.strip() for field in row.split(",")] for row in rows]
    return [
        {"name": name, "capability": capability, "memory_gib": round(float(mib) / 1024, 1)}
        for name, capability, mib in (row for row in fields if len(row) == 3)
        if re.fullmatch(r"\d+\.\d+", capability) and mib.isdigit()
    ]


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


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it is missing, hangs or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""
