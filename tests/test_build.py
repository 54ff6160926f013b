"""Every way to build and install the project, and what the binary may hold."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import inception_ext
from inception_ext import _library

ROOT = Path(__file__).resolve().parent.parent
# The CPU kernels, soon compiled: the build in use shows that those for CUDA compile and load.
BUILD = {"INCEPTION_EXT_CUDA": "0", "CXXFLAGS": "-O0"}
USES_AN_OP = (
    "import torch, inception_ext as e; from inception_ext import _library as l;"
    "assert l.is_available(), l.load_error();"
    "x = torch.randn(1, 3, 4, 4);"
    "y = torch.ops.inception_ext.max_pool_forward(x, [2, 2], [2, 2], [0, 0], False, False)[0];"
    "assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2));"
    "print(e.__file__); print(l.build_info()['cuda'])"
)
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(),
    reason="nvcc is not installed",
)


def run(*command: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Runs a command; its output, or a failure that shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        env={
            **os.environ,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "INCEPTION_EXT_EMULATOR": "0",
            **(env or {}),
        },
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def pip(*arguments: object, env: dict[str, str] | None = None) -> str:
    return run(sys.executable, "-m", "pip", *arguments, env=env)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what the build needs, so that builds do not meet in one folder."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("csrc", "inception_ext", "tests", "benchmarks", "docs"):
        if (ROOT / name).exists():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    return copy


def import_from(folder: Path) -> list[str]:
    """Imports the package from a folder, calls one op; the package's file and its CUDA version."""
    env = {"PYTHONPATH": str(folder)}
    lines = run(sys.executable, "-W", "error", "-c", USES_AN_OP, env=env, cwd=folder).splitlines()
    assert Path(lines[0]).is_relative_to(folder)
    return lines


@pytest.fixture
def unpacked(sources: Path, tmp_path: Path) -> Path:
    """What a source distribution holds."""
    dist = tmp_path / "dist"
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", dist, sources)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    return folder


@pytest.mark.build
def test_sdist_to_wheel_to_import_and_plain_install(
    sources: Path, unpacked: Path, tmp_path: Path
) -> None:
    """The second build finds the objects of the first, and compiles nothing."""
    in_tree = {path.relative_to(sources) for path in (sources / "csrc").rglob("*")}
    assert in_tree <= {path.relative_to(unpacked) for path in unpacked.rglob("*")}
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, unpacked, env=BUILD)
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith(f"inception_ext-{inception_ext.__version__}-cp310-abi3-linux")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"inception_ext/_C.abi3.so", "inception_ext/py.typed"} <= names
    assert any(name.startswith("inception_ext/data/") for name in names)
    assert not any("_emulator" in name for name in names)  # it is for tests
    pip("install", "--no-deps", "--target", site, wheel)
    assert import_from(site)[1] == "None"

    plain = tmp_path / "plain"
    options = ("-v", "--no-build-isolation", "--no-deps", "--target", plain)
    log = pip("install", *options, unpacked, env=BUILD)
    assert "no CUDA kernels" in log and "] cxx " not in log
    assert import_from(plain)[1] == "None"


@pytest.mark.build
@needs_nvcc
def test_default_architectures_follow_nvcc(sources: Path) -> None:
    text = run(
        sys.executable,
        "-c",
        "import sys, setuptools; setuptools.setup = lambda **_: None; sys.argv = ['setup.py'];"
        "import runpy; cuda = runpy.run_path('setup.py')['Cuda'].find();"
        "print(cuda.home); print(*cuda.targets(cuda.architectures()))",
        cwd=sources,
        env={"TORCH_CUDA_ARCH_LIST": "", "INCEPTION_EXT_CUDA": "auto"},
    )
    home, targets = text.splitlines()[-2:]
    assert (Path(home) / "include" / "cuda_runtime.h").exists()
    assert "sm_80" in targets and "sm_90a" in targets and "compute_" in targets.split()[-1]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"INCEPTION_EXT_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "INCEPTION_EXT_CUDA=1, but no nvcc in CUDA_HOME=/nowhere",
        ),
        ({"INCEPTION_EXT_CUDA": "yes"}, "INCEPTION_EXT_CUDA: expected auto, 0 or 1, got 'yes'"),
        (
            {"INCEPTION_EXT_EMULATOR": "yes"},
            "INCEPTION_EXT_EMULATOR: expected auto, 0 or 1, got 'yes'",
        ),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "8.0;native", "INCEPTION_EXT_CUDA": "auto"},
            "expected entries like 8.0, 9.0a or 12.0+PTX, got 'native'",
            marks=needs_nvcc,
        ),
    ],
)
def test_build_errors_are_one_line(sources: Path, env: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=sources,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("inception_ext: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def binary() -> Path:
    assert _library.is_available(), _library.load_error()
    return Path(_library._C.__file__)


def test_binary_is_abi3_and_holds_no_torch_cpp_symbol() -> None:
    path = binary()
    assert path.name == "_C.abi3.so"
    listing = run("nm", "-D", "--demangle", path)
    offending = re.findall(r".*\b(?:at|c10)::.*", listing)
    assert not offending, offending[:5]
    mangled = run("nm", "-D", path)
    assert not re.findall(r".*_ZN(?:K)?(?:2at|3c10).*", mangled)


def test_binary_exports_its_entry_point_alone() -> None:
    defined = [
        line.split()[-1]
        for line in run("nm", "-D", "--defined-only", binary()).splitlines()
        if line.split()[-2] in "TDBV"
    ]
    assert defined == ["PyInit__C"]


def test_binary_uses_the_stable_python_api_alone() -> None:
    undefined = run("nm", "-D", "--undefined-only", binary()).split()
    python = {name for name in undefined if name.startswith(("Py", "_Py"))}
    assert python <= {"PyModule_Create2", "Py_BuildValue"}


@needs_nvcc
def test_binary_holds_cuda_kernels_beside_a_cpu_torch() -> None:
    info = _library.build_info()
    if os.environ.get("INCEPTION_EXT_CUDA") == "0":
        assert info["cuda"] is None
    else:
        assert info["cuda"] and info["architectures"]
        assert b".nv_fatbin" in binary().read_bytes()
    assert info["version"] == inception_ext.__version__
    assert torch.__version__.split("+")[0].startswith("2.")
