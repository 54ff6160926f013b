"""Builds `inception_ext._C`, one abi3 file for every Python >= 3.10 and every torch >= 2.11.

Environment:
    INCEPTION_EXT_CUDA    auto (default): build the CUDA kernels where nvcc is found;
                          1: a missing nvcc is an error; 0: CPU kernels only.
    CUDA_HOME             the CUDA toolkit; default: the one whose nvcc is on PATH.
    TORCH_CUDA_ARCH_LIST  for example "8.0;9.0a+PTX"; default: all that this nvcc supports out of
                          DEFAULT_ARCHITECTURES, plus PTX for the newest.
    MAX_JOBS              compilers at once; default: as cores and free memory allow.
    CXX, CXXFLAGS         the C++ compiler and flags added to its command line.

Nothing is downloaded. nvcc decides on CUDA, not torch: with a CPU-only torch the same complete
file is built, and it runs as it is beside a CUDA torch.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
ARCHITECTURE_NAMES = {
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0a",
    "Blackwell": "10.0;12.0",
}
TORCH_TARGET = "0x020b000000000000"  # torch 2.11: the oldest libtorch that the file loads beside
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]


class BuildError(SystemExit):
    """Ends the build with one readable line instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"inception_ext: {message}")


class Cuda:
    """The CUDA toolkit behind one nvcc."""

    def __init__(self, nvcc: Path) -> None:
        self.nvcc = nvcc
        # nvcc may be a wrapper script: ask it where its toolkit lies.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True
        ).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)
        self.home = Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if not release:
            raise BuildError(f"{nvcc} --version does not name a release; is it nvcc?")
        self.version = release[1]

    @classmethod
    def find(cls) -> "Cuda | None":
        mode = os.environ.get("INCEPTION_EXT_CUDA", "auto")
        if mode not in ("auto", "0", "1"):
            raise BuildError(f"INCEPTION_EXT_CUDA: expected auto, 0 or 1, got {mode!r}")
        if mode == "0":
            return None
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        found = shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")
        if not found and not home:
            found = shutil.which("/usr/local/cuda/bin/nvcc")
        if found:
            return cls(Path(found))
        if mode == "1":
            where = f"CUDA_HOME={home}" if home else "PATH or /usr/local/cuda"
            raise BuildError(f"INCEPTION_EXT_CUDA=1, but no nvcc in {where}")
        return None

    def architectures(self) -> "list[str]":
        """The list of '8.0', '9.0a', '12.0+PTX', as the user asked or as this nvcc supports."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        if asked:
            for name, numbers in ARCHITECTURE_NAMES.items():
                asked = re.sub(name, numbers, asked, flags=re.I)
            architectures = [a for a in re.split(r"[;,\s]+", asked) if a]
            for architecture in architectures:
                if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", architecture):
                    raise BuildError(
                        f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, "
                        f"got {architecture!r}"
                    )
            return architectures
        known = subprocess.run(
            [self.nvcc, "--list-gpu-arch"], capture_output=True, text=True
        ).stdout.split()
        supported = [
            a for a in DEFAULT_ARCHITECTURES if f"compute_{a.replace('.', '').rstrip('a')}" in known
        ]
        if not supported:
            raise BuildError(f"nvcc {self.version} supports none of {DEFAULT_ARCHITECTURES}")
        return [*supported[:-1], supported[-1] + "+PTX"]

    @staticmethod
    def targets(architectures: "list[str]") -> "list[str]":
        """The code objects that the file will hold: 'sm_80', and 'compute_120' for PTX."""
        names = []
        for architecture in architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            names.append(f"sm_{number}")
            if architecture.endswith("+PTX"):
                names.append(f"compute_{number}")
        return names

    @classmethod
    def gencode(cls, architectures: "list[str]") -> "list[str]":
        flags = []
        for target in cls.targets(architectures):
            number = target.split("_")[1]
            flags += ["-gencode", f"arch=compute_{number},code={target}"]
        return flags


def default_jobs() -> int:
    """Compilers at once: one a core, and 2 GiB of free memory each."""
    cores = len(os.sched_getaffinity(0))
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    available = re.search(r"MemAvailable:\s+(\d+) kB", text)
    by_memory = int(available[1]) // (2 << 20) if available else cores
    return max(1, min(cores, by_memory))


def define(name: str, text: str) -> str:
    """A preprocessor definition of a string literal, quoted for the shell."""
    return f'-D{name}=\\"{text}\\"'


def ninja_quote(text: object) -> str:
    """Escapes a path for a ninja build statement."""
    return re.sub(r"([$ :])", r"$\1", str(text))


class NinjaBuild(build_ext):
    """Compiles .cpp with the C++ compiler, .cu with nvcc and links them, all through ninja."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        torch_root = Path(torch.__file__).parent
        cuda = Cuda.find()
        architectures = cuda.architectures() if cuda else []
        sources = [ROOT / s for s in ext.sources if cuda or not s.endswith(".cu")]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / "ninja"  # kept: a second build compiles only what changed
        build_dir.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or default_jobs())
        print(
            f"inception_ext: torch {torch.__version__}, "
            + (f"CUDA {cuda.version} for {' '.join(architectures)}" if cuda else "no CUDA kernels")
            + f", {len(sources)} sources, {jobs} jobs -> {output.name}",
            flush=True,
        )

        from sysconfig import get_paths

        includes = [
            f"-I{ROOT / 'csrc'}",
            f"-isystem {torch_root / 'include'}",
            f"-isystem {get_paths()['include']}",
        ]
        defines = [
            "-DPy_LIMITED_API=0x030a0000",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            define("INCEPTION_EXT_VERSION", self.distribution.get_version()),
            define("INCEPTION_EXT_TORCH_VERSION", torch.__version__),
        ]
        exports = build_dir / "exports.map"  # all but the module's entry point stays inside
        exports.write_text("{ global: PyInit__C; local: *; };\n")
        link_flags = ["-shared", f"-Wl,--version-script={exports}"]
        libraries = [f"-L{torch_root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if cuda:
            defines += [
                define("INCEPTION_EXT_CUDA_VERSION", cuda.version),
                define("INCEPTION_EXT_ARCHITECTURES", ",".join(cuda.targets(architectures))),
            ]
            includes.append(f"-isystem {cuda.home / 'include'}")
            library_dir = cuda.home / "lib64"
            libraries += [f"-L{library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        cxx_flags = [*CXX_FLAGS, *defines, *includes, os.environ.get("CXXFLAGS", "")]
        nvcc_flags = [*NVCC_FLAGS, f"-I{ROOT / 'csrc'}"]
        nvcc_flags += Cuda.gencode(architectures) if cuda else []

        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {os.environ.get('CXX', 'c++')}",
            f"nvcc = {cuda.nvcc if cuda else ''}",
            "rule cxx",
            f"  command = $cxx -MMD -MF $out.d {' '.join(cxx_flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = C++  $in",
            "rule nvcc",
            f"  command = $nvcc -MMD -MF $out.d {' '.join(nvcc_flags)} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule link",
            f"  command = $cxx {' '.join(link_flags)} $in -o $out {' '.join(libraries)}",
            "  description = link $out",
        ]
        objects = []
        for source in sources:
            obj = build_dir / source.relative_to(ROOT).with_suffix(source.suffix + ".o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {ninja_quote(obj)}: {rule} {ninja_quote(source)}")
            objects.append(ninja_quote(obj))
        library = build_dir / output.name
        lines.append(f"build {ninja_quote(library)}: link {' '.join(objects)}\n")
        (build_dir / "build.ninja").write_text("\n".join(lines))

        command = [sys.executable, "-m", "ninja", "-C", str(build_dir), "-j", str(jobs)]
        if self.verbose > 1:
            command.append("-v")
        if subprocess.run(command).returncode:
            raise BuildError("the compiler failed; its message stands above")
        shutil.copyfile(library, output)


def sources() -> "list[str]":
    """Every kernel and glue file, relative to the root, in a fixed order."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("torch", "cpu", "kernels")
        for path in (ROOT / "csrc" / folder).rglob("*")
        if path.suffix in (".cpp", ".cu")
    ]
    return sorted(found)


setup(
    ext_modules=[Extension("inception_ext._C", sources(), py_limited_api=True)],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
