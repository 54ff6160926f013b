"""Rules that the sources under csrc keep, and what ptxas says about the kernels."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_toolkit import build_report, compile_kernels, find_nvcc, find_tool, included_files

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".inl"}
)
KERNELS = sorted((CSRC / "kernels").rglob("*.cu"))
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc not installed")

FRAMEWORK = re.compile(r"(torch|ATen|c10|pybind11)/|Python\.h")


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(CSRC))


def includes_a_framework(path: Path) -> list[str]:
    """What a file includes of torch or Python; our own csrc/torch is `torch/` as well."""
    return [name for name in includes(path) if FRAMEWORK.match(name)]


def test_there_are_sources():
    assert KERNELS and len(SOURCES) > len(KERNELS)


def test_the_rule_sees_every_spelling(tmp_path):
    """The search itself."""
    names = ("torch/extension.h", "ATen/ATen.h", "c10/cuda/CUDAStream.h", "pybind11/pybind11.h")
    for name in (*names, "Python.h", "torch/csrc/stable/tensor.h"):
        for text in (f"#include <{name}>", f'#include "{name}"', f"  #  include <{name}>"):
            path = tmp_path / "source.cu"
            path.write_text(f"// first line\n{text}\n")
            assert includes_a_framework(path) == [name]


def test_only_the_glue_includes_torch_or_python():
    """And the emulator's controls, which are a Python module, pybind11."""
    found = {}
    for path in SOURCES:
        folder, names = relative(path).split("/")[0], includes_a_framework(path)
        if folder == "emulator":
            names = [name for name in names if not name.startswith("pybind11/")]
        if folder != "torch" and names:
            found[relative(path)] = names
    assert not found


def test_nvcc_never_reads_torch():
    """No kernel source, and nothing that one includes, reaches a torch header."""
    kernels = [path for path in SOURCES if path.suffix in {".cu", ".cuh"}]
    seen = {path for source in kernels for path in included_files(source)}
    for path in seen:
        assert not includes_a_framework(path), relative(path)
    assert CSRC / "kernels" / "params.h" in seen


def test_cuda_sources_live_with_the_kernels():
    elsewhere = [relative(p) for p in SOURCES if p.suffix in {".cu", ".cuh"}]
    assert not [name for name in elsewhere if not name.startswith("kernels/")]


def test_kernels_start_through_the_launch_helper():
    for path in SOURCES:
        text = path.read_text()
        assert "<<<" not in text, relative(path)
        if relative(path) != "kernels/launch.h":
            assert "cudaLaunchKernel" not in text, relative(path)


def test_emulator_enters_through_the_wrappers():
    """INCEPTION_EXT_EMULATE decides in the wrappers and the launch; kernels do not ask for it."""
    asking = re.compile(r"^\s*#\s*(if|ifdef|ifndef|elif).*INCEPTION_EXT_EMULATE", re.MULTILINE)
    kernels = [path for path in SOURCES if relative(path).startswith("kernels/")]
    found = {relative(path) for path in kernels if asking.search(path.read_text())}
    wrappers = {relative(path) for path in kernels if relative(path).startswith("kernels/device/")}
    assert found <= wrappers | {"kernels/launch.h"}
    assert {"kernels/device/platform.cuh", "kernels/launch.h"} <= found


def test_kernels_reach_memory_through_the_wrappers():
    """PTX stands in the wrappers only, and nobody declares shared memory past them."""
    for path in SOURCES:
        if relative(path).startswith("kernels/") and "/device/" not in relative(path):
            found = re.search(r"\b(asm|__shared__)\b", path.read_text())
            assert not found, f"{relative(path)}: {found}"


def ptxas_report(text: str, architecture: str) -> dict[str, dict[str, int]]:
    """Of each kernel: stack frame and spills in bytes, registers."""
    start = rf"Compiling entry function '(?P<name>\w+)' for '{architecture}'"
    rest = r"((?!Compiling entry).)*?"  # of this kernel
    pattern = re.compile(
        start + rest + r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads" + rest + r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    names = ("stack", "stores", "loads", "registers")
    report = {
        match["name"]: {name: int(match[name]) for name in names}
        for match in pattern.finditer(text)
    }
    assert len(report) == len(re.findall(start, text))
    return report


def test_ptxas_report():
    """The reading itself, of several architectures and of text that tells too little."""

    def kernel(name: str, architecture: str, spills: int) -> str:
        return (
            f"ptxas info    : Compiling entry function '{name}' for '{architecture}'\n"
            f"ptxas info    : Function properties for {name}\n"
            f"    8 bytes stack frame, {spills} bytes spill stores, 4 bytes spill loads\n"
            f"ptxas info    : Used 40 registers, used 1 barriers\n"
        )

    text = kernel("a", "sm_80", 0) + kernel("b", "sm_80", 16) + kernel("a", "sm_90a", 24)
    figures = {"stack": 8, "stores": 16, "loads": 4, "registers": 40}
    report = ptxas_report(text, "sm_80")
    assert list(report) == ["a", "b"] and report["b"] == figures
    assert ptxas_report(text, "sm_90a") == {"a": {**figures, "stores": 24}}
    assert ptxas_report(text, "sm_120") == {}
    with pytest.raises(AssertionError):
        ptxas_report(text.replace("Used 40", "used 40", 1), "sm_80")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_120"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels_neither_spill_nor_use_local_memory(source, architecture):
    text = build_report(source)
    if f"for '{architecture}'" not in text:
        _, text = compile_kernels(source, architecture)
    assert "warning" not in text, text
    report = ptxas_report(text, architecture)
    holds_kernels = re.search(r"__global__|^template cudaError_t", source.read_text(), re.MULTILINE)
    assert report or not holds_kernels
    offenders = {
        name: figures
        for name, figures in report.items()
        if figures["stack"] or figures["stores"] or figures["loads"]
    }
    assert not offenders


@needs_nvcc
@pytest.mark.skipif(
    find_tool("cuobjdump") is None or find_tool("nvdisasm") is None,
    reason="no cuobjdump and nvdisasm (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)",
)
def test_float16_products_are_those_of_tensor_cores():
    """Each kernel of the group holds HMMA, asynchronous copies, ldmatrix, and no local memory."""
    cubin, _ = compile_kernels(CSRC / "kernels" / "conv_group_float16.cu", "sm_90a")
    disassembler = str(Path(find_tool("nvdisasm") or "").parent)
    done = subprocess.run(
        [find_tool("cuobjdump"), "-sass", cubin],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{disassembler}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    kernels = done.stdout.split("Function : ")[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        assert len(re.findall(r"\bHMMA\.16816\.F32\b", kernel)) >= 16, kernel[:80]
        assert "LDGSTS" in kernel and "LDSM" in kernel, kernel[:80]
        assert not re.search(r"\b(LDL|STL)\b", kernel), kernel[:80]
