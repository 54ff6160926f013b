"""What a measurement is worth nothing without: machine, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "torchvision", "triton", "onnx", "onnxruntime", "openvino", "numpy"),
    *("tensorrt", "nvidia-cudnn-frontend"),
)


def describe() -> dict[str, Any]:
    """Facts for the head of a result file; no host name, no path."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "gpu": gpu(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """CPU model, instruction set that torch uses, usable cores, memory in GiB, load."""
    return {
        "cpu": cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def gpu() -> dict[str, Any] | None:
    """The current GPU: name, driver, CUDA, cuDNN, L2 cache, clocks; None where torch finds none."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    facts = {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "l2_mib": round(getattr(device, "L2_cache_size", 0) / 2**20, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return {**facts, **_nvidia_smi()}


_QUERY = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


def _nvidia_smi() -> dict[str, str | None]:
    """What the driver's tool tells of the first GPU; None for all where it is missing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(_QUERY)
    values = [value.strip() for value in run.stdout.split("\n", 1)[0].split(",")]
    if run.returncode != 0 or len(values) != len(_QUERY):
        return dict.fromkeys(_QUERY)
    return dict(zip(_QUERY, values, strict=True))


class Company:
    """How many cores other programs use, on average since this object was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time(), _busy_seconds()

    def cores(self) -> float | None:
        """None where the system does not tell (Linux's ``/proc/stat`` does, in steps of 10 ms)."""
        wall, own, busy = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        others = (now - busy) - (time.process_time() - own)
        return round(max(others, 0.0) / max(time.perf_counter() - wall, 1e-9), 2)


def _busy_seconds() -> float | None:
    """CPU time that all programs together have used since the machine started."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for a disk
    return busy / os.sysconf("SC_CLK_TCK")


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def versions() -> dict[str, str | None]:
    """Installed versions by package, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        from inception_ext import __version__

        found["inception_ext"] = __version__
    except ImportError:
        found["inception_ext"] = None
    return found


def commit() -> str | None:
    """Hash of the checked-out commit, with ``-dirty`` where tracked files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        describe = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return describe.stdout.strip()
