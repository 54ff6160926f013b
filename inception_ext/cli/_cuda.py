"""What is found of CUDA on this machine, with or without a torch that can use it."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["devices", "driver", "nvcc"]


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


def _output(command: list[str]) -> str:
    """What a command prints; nothing where it is missing, hangs or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""
