"""Where the CUDA toolkit lies, and kernels compiled by it, once for all test workers."""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
    candidates += in_wheels("include")
    names = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((c for c in candidates if all((c / name).is_file() for name in names)), None)


def in_wheels(name: str) -> list[Path]:
    """Files or folders of that name at the top of NVIDIA's wheels."""
    wheels = importlib.util.find_spec("nvidia")
    folders = wheels.submodule_search_locations or [] if wheels else []
    return [path for folder in folders for path in sorted(Path(folder).glob(f"*/{name}"))]


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: beside nvcc, in PATH, or in a wheel (nvidia-cuda-cuobjdump)."""
    beside = Path(find_nvcc() or "nvcc").resolve().parent / name
    wheel = next(iter(in_wheels(f"bin/{name}")), None)
    found = shutil.which(str(beside)) or shutil.which(name)
    return found or (shutil.which(str(wheel)) if wheel else None)


def included_files(source: Path) -> list[Path]:
    """The source and all of csrc that it includes."""
    found: dict[Path, None] = {source: None}
    queue = [source]
    while queue:
        path = queue.pop()
        pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
        for name in pattern.findall(path.read_text()):
            for base in (path.parent, ROOT / "csrc"):
                candidate = (base / name).resolve()
                if candidate.is_file() and candidate not in found:
                    found[candidate] = None
                    queue.append(candidate)
    return list(found)


def build_report(source: Path) -> str:
    """What ptxas said of a source when the package was built; "" unless that is up to date."""
    log = ROOT / "build" / "ninja" / source.relative_to(ROOT).with_suffix(".cu.o.log")
    if not log.exists():
        return ""
    built = log.stat().st_mtime
    is_new = all(path.stat().st_mtime < built for path in included_files(source))
    return log.read_text() if is_new else ""


def compile_kernels(source: Path, architecture: str) -> tuple[Path, str]:
    """The cubin of a source, and what nvcc and ptxas had to say."""
    nvcc = find_nvcc()
    assert nvcc is not None
    command = [nvcc, "-std=c++20", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
    command += [f"-I{ROOT / 'csrc'}", str(source)]
    digest = hashlib.sha256(repr(command).encode())
    for path in included_files(source):
        digest.update(str(path).encode() + path.read_bytes())
    folder = ROOT / "build" / "tests" / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.stem}-{architecture}"
    cubin = folder / f"{name}-{digest.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker compiles, the others wait
        if not report.exists():
            for stale in folder.glob(f"{name}-{'[0-9a-f]' * 16}.*"):
                stale.unlink()
            result = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            report.write_text(result.stderr)
    return cubin, report.read_text()
