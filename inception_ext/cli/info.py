"""Show what is installed, what the binary holds, and which paths are active and why."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inception_ext import _gate, _library
from inception_ext._architectures import covering_architecture
from inception_ext._console import say
from inception_ext.cli import _cuda

__all__ = ["add_arguments", "collect", "render", "run"]

SWITCHES = {
    "INCEPTION_EXT_DISABLE": "1: never use the kernels",
    "INCEPTION_EXT_REQUIRE": "1: missing kernels are an ImportError",
    "INCEPTION_EXT_CUDA": "at build time: auto, 0 or 1",
}
BESIDE = ("torchvision", "numpy", "scikit-image", "scikit-learn", "matplotlib", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    say(json.dumps(facts, indent=2) if args.json else render(facts))
    return 0


def collect() -> dict[str, Any]:
    """All that ``info`` shows, as JSON values."""
    binary = {
        "available": _library.is_available(),
        "error": _library.load_error(),
        **_library.build_info(),
    }
    devices = _cuda.devices()
    for device in devices:
        device["runs"] = covering_architecture(binary["architectures"], device["capability"])
    return {
        "version": _version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "cpu": _cpu(),
        "binary": binary,
        "cuda": {"nvcc": _cuda.nvcc(), "driver": _cuda.driver(), "devices": devices},
        "paths": _paths(binary, devices),
        "switches": {k: v for k, v in sorted(os.environ.items()) if k.startswith("INCEPTION_EXT_")},
        "packages": {name: _installed(name) for name in BESIDE},
    }


def _version() -> str:
    from inception_ext import __version__

    return __version__


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    try:  # a private operator of torch
        bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        bfloat16 = False
    return {
        "model": model[1].strip() if model else platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn": torch.backends.mkldnn.is_available(),
        "onednn_bfloat16": bfloat16,
    }


def _paths(binary: Mapping[str, Any], devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``name``, ``active`` and ``why`` of each way that a call may go."""
    unavailable = _gate.why_unavailable()
    cpu = unavailable or _gate.why_reference(torch.empty(1, 8, 4, 4))
    taken = f"float32 and bfloat16, {binary['cpu_isa']} kernels"
    cuda = _why_no_cuda(unavailable, binary, devices)
    active = [name for name, why in (("CPU", cpu), ("CUDA", cuda)) if why is None]
    rest = f"whatever the {' and '.join(active)} kernels do not take" if active else "everything"
    return [
        {"name": "CPU kernels", "active": cpu is None, "why": cpu or taken},
        {"name": "CUDA kernels", "active": cuda is None, "why": cuda or _cuda_ops()},
        {"name": "reference", "active": True, "why": f"plain PyTorch for {rest}"},
    ]


def _why_no_cuda(
    unavailable: str | None, binary: Mapping[str, Any], devices: list[dict[str, Any]]
) -> str | None:
    """The first reason against the CUDA kernels, or None."""
    if unavailable:
        return unavailable
    if not binary["cuda"]:
        return "the binary was built without CUDA"
    if not devices:
        return "no CUDA device"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    if not torch.cuda.is_available():
        return "torch cannot use the CUDA device"
    if not any(device["runs"] for device in devices):
        return "the binary has no code for these devices"
    return None


def _cuda_ops() -> str:
    """Which ops have a CUDA kernel in this version."""
    x = torch.empty(1, 8, 4, 4, device="cuda", dtype=torch.float16)
    if _gate.why_reference(x) is None:
        return "float16, bfloat16 and float32"
    if _gate.why_pool_reference(x, 3, 2) is None:
        return "max pool: float16, bfloat16 and float32; the rest has none yet"
    return "none in this version"


def render(facts: Mapping[str, Any]) -> str:
    """The facts as text for people."""
    cpu, binary, cuda = facts["cpu"], facts["binary"], facts["cuda"]
    cores = f"{cpu['cores']} core{'s' * (cpu['cores'] != 1)}"
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    lines = [
        f"inception_ext {facts['version']}",
        _row("Python", f"{facts['python']}, {facts['platform']}"),
        _row("torch", f"{facts['torch']['version']}, CUDA {facts['torch']['cuda'] or 'none'}"),
        _row("CPU", f"{cpu['model']}, {cores}, {threads}"),
        _row(
            "",
            f"torch uses {cpu['torch_isa']}, oneDNN {'on' if cpu['onednn'] else 'missing'}, "
            f"bfloat16 {'supported' if cpu['onednn_bfloat16'] else 'not supported'}",
        ),
        _row("beside it", ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v) or "-"),
        "",
        "Binary",
    ]
    if binary["available"]:
        lines += [
            _row("built with", f"torch {binary['torch_built_with']}"),
            _row("CPU kernels", str(binary["cpu_isa"])),
            _row("CUDA", f"{binary['cuda']}: {' '.join(binary['architectures'])}")
            if binary["cuda"]
            else _row("CUDA", "none"),
        ]
    else:
        lines.append(_row("missing", str(binary["error"])))
    driver, nvcc = cuda["driver"], cuda["nvcc"]
    lines += [
        "",
        "CUDA on this machine",
        _row("nvcc", f"{nvcc['version']} ({nvcc['path']})" if nvcc else "none"),
        _row(
            "driver",
            f"{driver['version'] or 'of unknown version'}, runs CUDA {driver['cuda'] or '?'}"
            if driver
            else "none",
        ),
        *[
            _row(
                "device",
                f"{d['name']}, capability {d['capability']}, {d['memory_gib']} GiB: "
                + (f"runs {d['runs']}" if d["runs"] else "not covered by the binary"),
            )
            for d in cuda["devices"]
        ],
    ]
    if not cuda["devices"]:
        lines.append(_row("devices", "none"))
    lines += ["", "Paths"]
    lines += [
        f"  {'on ' if path['active'] else 'off'} {path['name']:13} {path['why']}"
        for path in facts["paths"]
    ]
    lines += ["", "Switches"]
    if facts["switches"]:
        lines += [
            f"  {name}={value}  ({SWITCHES.get(name, 'unknown')})"
            for name, value in facts["switches"].items()
        ]
    else:
        lines.append(f"  none set (there are {', '.join(SWITCHES)})")
    return "\n".join(lines)


def _row(name: str, text: str) -> str:
    return f"  {name:13} {text}"
