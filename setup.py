"""Builds `inception_ext._C`, one abi3 file for every Python >= 3.10 and every torch >= 2.11.

Environment:
    INCEPTION_EXT_CUDA    auto (default): build the CUDA kernels where nvcc is found;
                          1: a missing nvcc is an error; 0: CPU kernels only.
    CUDA_HOME             the CUDA toolkit; default: the one whose nvcc is on PATH.
    TORCH_CUDA_ARCH_LIST  for example "8.0;9.0a+PTX"; default: all that this nvcc supports out of
                          DEFAULT_ARCHITECTURES, plus PTX for the newest.
    INCEPTION_EXT_EMULATOR  1: also build `inception_ext._emulator`, which runs the CUDA kernels on
                          the CPU for tests; auto: where the CUDA headers are found;
                          0 (default): do not.
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
EMULATOR = "inception_ext._emulator"
KERNELS_FOLDER = ROOT / "build" / "ninja"
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads", "2"]
NVCC_FLAGS += ["-Xptxas", "-v"]  # registers and spills of each kernel, for tests


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


def cuda_headers() -> "Path | None":
    """The folder of cuda_runtime_api.h and cuda_fp16.h: that of an nvcc, or of a wheel."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    folders = [Path(home) / "include", *([Cuda(Path(nvcc)).home / "include"] if nvcc else [])]
    for entry in sys.path:
        folders += sorted(Path(entry).glob("nvidia/*/include"))
    names = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
    return next((f for f in folders if all((f / name).is_file() for name in names)), None)


def has_x86_64_v3() -> bool:
    """Whether this processor runs AVX2, FMA and F16C code."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return {"avx2", "fma", "f16c", "bmi2", "movbe"} <= words


class NinjaFile:
    """Sources to objects to one shared library that exports its module's entry point alone."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder = folder  # kept: a second build compiles only what changed
        folder.mkdir(parents=True, exist_ok=True)
        self.exports = folder / "exports.map"
        self.exports.write_text(f"{{ global: PyInit_{module}; local: *; }};\n")
        self.cxx = os.environ.get("CXX", "c++")
        self.lines = ["ninja_required_version = 1.5"]
        self.objects: list[str] = []

    def rule(self, name: str, compiler: object, flags: "list[str]", report: str = "") -> None:
        """``report``: lines that match go to $out.log alone; the rest is shown as ever."""
        command = f"{compiler} -MMD -MF $out.d {' '.join(flags)} -c $in -o $out"
        if report:
            command += f" 2> $out.log; status=$$?; grep -vE '{report}' $out.log >&2; exit $$status"
        self.lines += [
            f"rule {name}",
            f"  command = {command}",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {name} $in",
        ]

    def object_of(self, source: Path) -> Path:
        return self.folder / source.relative_to(ROOT).with_suffix(source.suffix + ".o")

    def compile(self, rule: str, source: Path) -> None:
        target = ninja_quote(self.object_of(source))
        self.lines.append(f"build {target}: {rule} {ninja_quote(source)}")
        self.objects.append(target)

    def link(self, name: str, libraries: "list[str]", jobs: int, verbose: bool) -> Path:
        """Runs ninja; the library."""
        flags = f"-shared -Wl,--version-script={self.exports}"
        library = self.folder / name
        self.lines += [
            "rule link",
            f"  command = {self.cxx} {flags} $in -o $out {' '.join(libraries)}",
            "  description = link $out",
            f"build {ninja_quote(library)}: link {' '.join(self.objects)}",
            "",
        ]
        (self.folder / "build.ninja").write_text("\n".join(self.lines))
        command = [sys.executable, "-m", "ninja", "-C", str(self.folder), "-j", str(jobs)]
        if subprocess.run([*command, *(["-v"] if verbose else [])]).returncode:
            raise BuildError("the compiler failed; its message stands above")
        return library


class NinjaBuild(build_ext):
    """Compiles .cpp with the C++ compiler, .cu with nvcc and links them, all through ninja."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        self.torch = Path(torch.__file__).parent
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or default_jobs())
        build = self.emulator if ext.name == EMULATOR else self.kernels
        file, libraries, summary = build(ext, torch.__version__)
        print(
            f"inception_ext: torch {torch.__version__}, {summary}, {len(file.objects)} sources, "
            f"{jobs} jobs -> {output.name}",
            flush=True,
        )
        shutil.copyfile(file.link(output.name, libraries, jobs, self.verbose > 1), output)

    def cxx_flags(self, defines: "list[str]", includes: "list[Path]") -> "list[str]":
        from sysconfig import get_paths

        system = [self.torch / "include", Path(get_paths()["include"]), *includes]
        return [
            *CXX_FLAGS,
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *defines,
            f"-I{ROOT / 'csrc'}",
            *(f"-isystem {folder}" for folder in system),
            os.environ.get("CXXFLAGS", ""),
        ]

    def torch_libraries(self) -> "list[str]":
        return [f"-L{self.torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]

    def kernels(self, ext: Extension, torch: str) -> "tuple[NinjaFile, list[str], str]":
        """_C: the ops for tensors of the CPU and, with nvcc, of CUDA."""
        cuda = Cuda.find()
        architectures = cuda.architectures() if cuda else []
        defines = [
            "-DPy_LIMITED_API=0x030a0000",
            define("INCEPTION_EXT_VERSION", self.distribution.get_version()),
            define("INCEPTION_EXT_TORCH_VERSION", torch),
        ]
        libraries = self.torch_libraries()
        if cuda:
            defines += [
                define("INCEPTION_EXT_CUDA_VERSION", cuda.version),
                define("INCEPTION_EXT_ARCHITECTURES", ",".join(cuda.targets(architectures))),
            ]
            libraries += [f"-L{cuda.home / 'lib64'}", "-lcudart_static", "-ldl -lrt -lpthread"]
        file = NinjaFile(KERNELS_FOLDER, "_C")
        file.rule("cxx", file.cxx, self.cxx_flags(defines, [cuda.home / "include"] if cuda else []))
        if cuda:
            flags = [*NVCC_FLAGS, f"-I{ROOT / 'csrc'}", *Cuda.gencode(architectures)]
            file.rule("nvcc", cuda.nvcc, flags, report="^ptxas info|bytes stack frame")
        for source in map(Path, ext.sources):
            if source.suffix == ".cpp":
                file.compile("cxx", ROOT / source)
            elif cuda:
                file.compile("nvcc", ROOT / source)
        summary = (
            f"CUDA {cuda.version} for {' '.join(architectures)}" if cuda else "no CUDA kernels"
        )
        return file, libraries, summary

    def emulator(self, ext: Extension, torch: str) -> "tuple[NinjaFile, list[str], str]":
        """_emulator: the CUDA kernels and their glue once more, by the C++ compiler."""
        import pybind11

        headers = cuda_headers()
        if headers is None:
            raise BuildError("INCEPTION_EXT_EMULATOR=1, but no cuda_fp16.h in CUDA_HOME or a wheel")
        defines = ["-DINCEPTION_EXT_EMULATE", define("INCEPTION_EXT_CUDA_VERSION", "emulated")]
        defines += ["-Wno-unknown-pragmas", *(["-march=x86-64-v3"] if has_x86_64_v3() else [])]
        file = NinjaFile(ROOT / "build" / "ninja-emulator", "_emulator")
        file.rule(
            "cxx",
            f"{file.cxx} -x c++",
            self.cxx_flags(defines, [headers, Path(pybind11.get_include())]),
        )
        for source in ext.sources:
            file.compile("cxx", ROOT / source)
        for source in sources("cpu"):  # as _C has them: it was built before
            file.objects.append(ninja_quote(KERNELS_FOLDER / f"{source}.o"))
        return file, [*self.torch_libraries(), "-ldl -lpthread"], "emulator"


def sources(*folders: str) -> "list[str]":
    """The C++ and CUDA sources in folders of csrc, relative to the root, in a fixed order."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / "csrc" / folder).rglob("*")
        if path.suffix in (".cpp", ".cu")
    ]
    return sorted(found)


def emulated_sources() -> "list[str]":
    """The emulator, the kernels, and the glue that launches kernels."""
    glue = ["csrc/torch/library.cpp"]
    for source in sources("torch"):
        if '#include "torch/cuda_launch.h"' in (ROOT / source).read_text():
            glue.append(source)
    return [*glue, *sources("emulator", "kernels")]


extensions = [
    Extension("inception_ext._C", sources("torch", "cpu", "kernels"), py_limited_api=True)
]
emulate = os.environ.get("INCEPTION_EXT_EMULATOR", "0")
if emulate not in ("auto", "0", "1"):
    raise BuildError(f"INCEPTION_EXT_EMULATOR: expected auto, 0 or 1, got {emulate!r}")
if emulate == "1" or (emulate == "auto" and cuda_headers()):
    extensions.append(Extension(EMULATOR, emulated_sources()))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
