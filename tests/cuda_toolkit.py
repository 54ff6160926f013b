"""Where the CUDA toolkit lies, for tests that compile kernels."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path


def find_nvcc() -> str | None:
    """CUDA_HOME, PATH, then the usual place."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            return shutil.which(str(Path(home) / "bin" / "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_headers() -> Path | None:
    """A folder with cuda_runtime_api.h, cuda_fp16.h and cuda_bf16.h: nvcc's, or a wheel's."""
    candidates = []
    if nvcc := find_nvcc():
        # nvcc may be a wrapper script: ask it where its toolkit lies.
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        plan = subprocess.run(command, capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE):
            candidates.append(Path(top[1].strip()).resolve() / "include")
    wheels = importlib.util.find_spec("nvidia")
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        candidates += sorted(Path(folder).glob("*/include"))
    names = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((c for c in candidates if all((c / name).is_file() for name in names)), None)
