"""The CPU kernels on their own: as built, and with sanitizers, run on every ISA at hand."""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "csrc" / "cpu"
KERNELS = sorted(FOLDER.glob("*.cpp"))
TESTS = sorted((ROOT / "tests" / "cpp").glob("test_cpu_*.cpp"))
BUILT = ROOT / "build" / "ninja"  # where setup.py leaves objects
WARNINGS = ["-Wall", "-Wextra"]
BUILDS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or shutil.which("c++") or "g++")


def environment(**extra: str) -> dict[str, str]:
    """Ours, without what a sanitizer would trip over."""
    env = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "CFLAGS", "CXXFLAGS")}
    # The leak check needs ptrace, which containers may refuse.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**env, **options, **extra}


def run(command: list[str], env: dict[str, str], timeout: int = 300) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


def built_objects() -> list[Path]:
    """Of the kernels in the binary; none where it has not seen the latest sources."""
    objects = [BUILT / f"{source.relative_to(ROOT)}.o" for source in KERNELS]
    linked = [path.stat().st_mtime for path in BUILT.glob("_C*.so")]
    latest = max(path.stat().st_mtime for path in FOLDER.iterdir())
    complete = all(path.exists() for path in objects) and linked and min(linked) > latest
    return objects if complete else []


def compile_all(directory: Path, sources: list[Path], flags: list[str]) -> list[Path]:
    """Their objects."""
    common = [*compiler(), "-std=c++17", "-pthread", *WARNINGS, *flags, f"-I{FOLDER}"]
    objects = [directory / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        run([*common, "-c", str(source), "-o", str(target)], environment())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Objects of the tests. A sanitizer has to see the kernels alone: buffers lie on the heap,
    which it surrounds whoever asks for them."""
    return compile_all(tmp_path_factory.mktemp("tests"), TESTS, BUILDS["plain"])


@pytest.fixture(scope="module", params=BUILDS)
def program(
    request: pytest.FixtureRequest,
    tests: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory, flags = tmp_path_factory.mktemp(request.param), BUILDS[request.param]
    kernels = built_objects() if request.param == "plain" else []
    objects = tests + (kernels or compile_all(directory, KERNELS, flags))
    program = directory / "test_cpu_kernels"
    run([*compiler(), "-pthread", *flags, *map(str, objects), "-o", str(program)], environment())
    return program


def active_isa(program: Path, wanted: str) -> str:
    """What the kernels run on when asked for an ISA: a lower one where the CPU lacks it."""
    return run([str(program), "--isa"], environment(INCEPTION_EXT_CPU_ISA=wanted)).strip()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_kernels(program: Path, isa: str) -> None:
    if active_isa(program, isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    out = run([str(program), isa], environment(INCEPTION_EXT_CPU_ISA=isa))
    assert out.startswith(f"isa {isa}\n")
    assert out.rstrip().endswith(" 0 failures")


def test_isa_override(program: Path) -> None:
    best = active_isa(program, "")
    order = ["generic", "avx2", "avx512"]
    for wanted in order:
        expected = order[min(order.index(wanted), order.index(best))]
        assert active_isa(program, wanted) == expected
    assert active_isa(program, "no such isa") == best


def test_isa_objects_share_no_code(program: Path) -> None:
    """A function that both an ISA's object and another define must not be picked by the linker.

    An inline function compiled with AVX-512 on, kept by the linker for every caller, crashes a
    CPU without it: each weak or global function of such an object belongs to its own namespace.
    """
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    for isa in ("avx2", "avx512"):
        own = program.parent / f"kernels_{isa}.o"
        built = BUILT / "csrc" / "cpu" / f"kernels_{isa}.cpp.o"
        file = own if own.exists() else built
        symbols = run(["nm", "-C", "--defined-only", str(file)], environment())
        functions = [line.split(" ", 2)[2] for line in symbols.splitlines() if line[17] in "TW"]
        strangers = [
            name
            for name in functions
            if f"inception_ext::cpu::{isa}::" not in name
            and "asan" not in name
            and "ubsan" not in name
        ]
        assert not strangers
