"""The SIMT emulator itself: right results, every planted bug reported, nothing else reported."""

import importlib.util
import platform
import re
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_toolkit import find_nvcc
from emulator_build import COMPILER, HEADERS, build_library

pytestmark = [
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_runtime_api.h, cuda_fp16.h)"),
    pytest.mark.skipif(COMPILER is None, reason="no host C++ compiler"),
]

SOURCES = Path(__file__).parent / "cpp" / "emulator"
NVCC = find_nvcc()

# What the report of each planted bug says; the place comes from the marker in the source.
BUGS = {
    "missing_barrier": "race in shared memory",
    "missing_barrier_before_reuse": "race in shared memory",
    "missing_copy_wait": "cp.async without a wait",
    "wait_for_too_few_groups": "cp.async without a wait",
    "shared_overrun": "writes 4 bytes at shared memory + 512 of 512",
    "global_write_overrun": "writes 4 bytes outside every tensor",
    "global_read_overrun": "reads 4 bytes outside every tensor",
    "copy_overrun": "reads 16 bytes outside every tensor",
    "misaligned_vector": "reads 8 bytes at a misaligned address",
    "write_to_input": "to an operand that is only read: x [1, 128]",
    "read_of_unwritten": "before a kernel wrote it: y [1, 128]",
    "unwritten_output": "4 bytes of y [1, 128] of 4-byte elements, the first at [0, 5]",
    "divergent_barrier": "divergent barrier",
    "barrier_in_half_a_warp": "divergent warp",
    "race_in_a_warp": "race in shared memory",
    "race_on_a_byte": "race in shared memory",
    "divergent_shuffle": "divergent warp",
    "barrier_for_too_many": "deadlock",
    "matrix_load_in_part_of_a_warp": "load_matrices|ldmatrix|all 32",
}


H100 = {"capability": 90, "multiprocessors": 132, "shared_limit": 227 << 10}  # the default device


def load_module(name: str = "emulator_tests", flags: tuple[str, ...] = ()) -> ModuleType:
    path = build_library(name, SOURCES / "module.cpp", flags, python=True)
    spec = importlib.util.spec_from_file_location("emulator_tests", path)  # as PyInit_ says
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PORTABLE = ("-DINCEPTION_EXT_PORTABLE_FIBERS", "-O0", "-march=x86-64")


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    return load_module()


@pytest.fixture
def emulator(compiled: ModuleType) -> ModuleType:
    """The module with one worker, its settings as they were and no launches left over."""
    compiled.set_settings(seed=0, checks=True, counting=True, workers=1, **H100)
    compiled.take_launches()
    return compiled


def marked_line(name: str) -> int:
    """The line of the source that carries a planted bug's marker."""
    for number, line in enumerate((SOURCES / "planted_bugs.cuh").read_text().splitlines(), 1):
        if line.endswith(f"// bug: {name}"):
            return number
    raise AssertionError(name)


def run_planted_bug(emulator: ModuleType, name: str, broken: bool) -> torch.Tensor:
    x, y = torch.arange(128.0), torch.full((128,), torch.nan)
    emulator.planted_bug(name, broken, x.data_ptr(), y.data_ptr())
    assert torch.equal(y, x.flip(0))
    return y


def test_every_planted_bug_is_listed(emulator):
    assert set(BUGS) == set(emulator.BUGS)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_reported(emulator, name):
    for seed in range(20):
        emulator.set_settings(seed=seed)
        with pytest.raises(RuntimeError) as caught:
            run_planted_bug(emulator, name, broken=True)
        report = str(caught.value)
        assert re.search(BUGS[name].replace("[", r"\[").replace("+", r"\+"), report), report
        assert f"{name}<true>" in report
        if name == "unwritten_output":  # no line wrote nothing: the launch has to do
            assert re.search(r"launched at module\.cpp:\d+", report)
        else:
            assert f"planted_bugs.cuh:{marked_line(name)}" in report, report
            assert f"seed {seed}" in report


@pytest.mark.parametrize("name", BUGS)
def test_clean_kernel_is_not_reported(emulator, name):
    for seed in range(200):
        emulator.set_settings(seed=seed)
        run_planted_bug(emulator, name, broken=False)


def test_report_names_both_sides_of_a_race(emulator):
    with pytest.raises(RuntimeError) as caught:
        run_planted_bug(emulator, "missing_barrier", broken=True)
    lines = str(caught.value).splitlines()
    read = marked_line("missing_barrier")
    assert lines[0] == "emulator: race in shared memory"
    assert re.fullmatch(
        rf"    thread \(\d+, 0, 0\) (reads|writes) 4 bytes at shared memory \+ \d+: "
        rf"planted_bugs\.cuh:({read}|{read - 2})",
        lines[1],
    )
    assert re.fullmatch(
        rf"    thread \(\d+, 0, 0\) (wrote|read) them: planted_bugs\.cuh:({read}|{read - 2})",
        lines[2],
    )
    assert "block (0, 0, 0) of grid (1, 1, 1), 128 threads" in lines[-1]


def test_report_of_a_divergent_barrier_lists_the_groups(emulator):
    with pytest.raises(RuntimeError) as caught:
        run_planted_bug(emulator, "divergent_barrier", broken=True)
    first = marked_line("divergent_barrier")
    for line in (first, first + 2):
        expected = r"(32|64) threads, the first thread \(\d+, 0, 0\), at __syncthreads: "
        assert re.search(expected + rf"planted_bugs\.cuh:{line}\b", str(caught.value))


def test_checks_can_be_turned_off(emulator):
    """The overrun is not looked for then; what it would report is the kernel's own business."""
    emulator.set_settings(checks=False)
    with pytest.raises(AssertionError):
        run_planted_bug(emulator, "missing_copy_wait", broken=True)  # the copies never arrive
    with pytest.raises(RuntimeError, match="divergent barrier"):  # what cannot go on stays an error
        run_planted_bug(emulator, "divergent_barrier", broken=True)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="not another build there")
def test_without_x86_assembler(emulator):
    """The portable contexts, and no instruction beyond the first x86-64: the same results."""
    portable = load_module("emulator_tests_portable", PORTABLE)
    portable.set_settings(workers=2)
    sizes = (150, 200, 136)
    first, second = (gemm(module, torch.float16, *sizes)[0] for module in (emulator, portable))
    torch.testing.assert_close(first, second, rtol=2**-10, atol=2**-10)
    for name in BUGS:
        run_planted_bug(portable, name, broken=False)
        with pytest.raises(RuntimeError):
            run_planted_bug(portable, name, broken=True)


def test_unknown_setting(emulator):
    with pytest.raises(TypeError, match="no setting named speed"):
        emulator.set_settings(speed=3)
    assert emulator.get_settings()["workers"] == 1


def test_settings_of_the_device(compiled):
    """They stay until they are changed; those of an H100 are there from the start."""
    fresh = load_module("emulator_tests_portable", PORTABLE)
    assert H100.items() <= fresh.get_settings().items()
    for name, value in {"capability": 75, "multiprocessors": 40, "shared_limit": 64 << 10}.items():
        compiled.set_settings(**{name: value})
        assert compiled.get_settings()[name] == value
    compiled.set_settings(**H100)


def test_shared_limit_is_that_of_a_block(emulator):
    """As on the device: cudaErrorInvalidConfiguration, and nothing runs."""
    emulator.set_settings(shared_limit=512)
    run_planted_bug(emulator, "missing_barrier", broken=False)  # 512 bytes
    emulator.set_settings(shared_limit=511)
    with pytest.raises(RuntimeError, match=r"cudaError 9$"):
        run_planted_bug(emulator, "missing_barrier", broken=False)


def test_below_capability_80_copies_are_done_at_once(emulator):
    for capability, arrives in ((75, True), (80, False)):
        emulator.set_settings(capability=capability, checks=False)
        if arrives:
            run_planted_bug(emulator, "missing_copy_wait", broken=True)
        else:
            with pytest.raises(AssertionError):
                run_planted_bug(emulator, "missing_copy_wait", broken=True)
    emulator.set_settings(capability=75, checks=True)
    run_planted_bug(emulator, "missing_copy_wait", broken=True)


def test_below_capability_80_products_come_in_halves(emulator):
    """Twice m16n8k8: as many multiply-accumulates, and the same sums in the same order."""
    results = []
    for capability in (90, 75):
        emulator.set_settings(capability=capability)
        results.append(gemm(emulator, torch.float16, 130, 70, 200)[0])
    assert torch.equal(*results)
    first, second = emulator.take_launches()
    assert first["issued_macs"] == second["issued_macs"]


@pytest.mark.parametrize("blocks", [1, 2, 37])
def test_atomics_and_what_other_blocks_wrote(emulator, blocks):
    """The last of the blocks, whichever it is, sees the parts of all and sums them in one order."""
    generator = torch.Generator().manual_seed(blocks)
    x = torch.randn(blocks, 128, generator=generator)
    expected = torch.zeros(128)
    for row in x:
        expected += row
    counter = torch.zeros(1, dtype=torch.int32)
    for seed in range(30):
        emulator.set_settings(seed=seed, workers=1 + seed % 3)
        parts, y = torch.full((blocks, 128), torch.nan), torch.full((128,), torch.nan)
        emulator.add_up_blocks(*(t.data_ptr() for t in (x, parts, counter, y)), blocks)
        assert torch.equal(y, expected) and counter.item() == 0
    launch = emulator.take_launches()[-1]
    touched = {entry.pop("operand"): entry for entry in launch["touched"]}
    assert touched["counter"] == {"read": 4, "written": 4}
    assert touched["parts"] == {"read": x.numel() * 4, "written": x.numel() * 4}
    assert launch["bytes_written"] == 4 * (x.numel() + 128 + blocks + 1)


def gemm(emulator: ModuleType, dtype: torch.dtype, m: int, n: int, k: int, *fault):
    """C of the emulator and of float64, for random operands."""
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator)
    c = torch.full((m, n), torch.nan, dtype=dtype)
    function = emulator.gemm_half if dtype == torch.float16 else emulator.gemm_bfloat16
    fault = fault or (emulator.Fault.NONE,)
    function(*fault, a.data_ptr(), b.data_ptr(), bias.data_ptr(), c.data_ptr(), m, n, k)
    return c, a.double() @ b.double().T + bias.double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(64, 64, 64), (1, 2, 8), (130, 70, 200), (200, 128, 72)], ids=str)
def test_gemm_matches_float64(emulator, dtype, size):
    c, exact = gemm(emulator, dtype, *size)
    unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    bound = unit * exact.abs() + 2.0**-16 * size[2]
    assert bool(((c.double() - exact).abs() <= bound).all())


def test_gemm_repeats_bit_for_bit_over_seeds_and_workers(emulator):
    first, _ = gemm(emulator, torch.float16, 200, 150, 136)
    for seed in range(1, 12):
        emulator.set_settings(seed=seed, workers=1 + seed % 3)
        again, _ = gemm(emulator, torch.float16, 200, 150, 136)
        assert torch.equal(again, first)


def test_gemm_counters(emulator):
    m, n, k = 130, 70, 200  # 3 x 2 tiles, 4 steps
    gemm(emulator, torch.float16, m, n, k)
    (launch,) = emulator.take_launches()
    assert emulator.take_launches() == []
    assert launch["kernel"].startswith("gemm_kernel<__half")
    assert launch["op"] == "gemm"
    assert launch["grid"] == (3, 2, 1) and launch["block"] == (128, 1, 1)
    assert launch["useful_macs"] == m * n * k
    assert launch["issued_macs"] == 6 * 64 * 64 * 256
    assert launch["barriers"] == 6 * (4 + 2)
    assert launch["bank_conflicts"] == 0 and launch["shared_passes"] > 0
    touched = {entry.pop("operand"): entry for entry in launch["touched"]}
    assert touched == {
        "a": {"read": 2 * m * k, "written": 0},
        "b": {"read": 2 * n * k, "written": 0},
        "bias": {"read": 4 * n, "written": 0},
        "c": {"read": 0, "written": 2 * m * n},
    }
    assert launch["bytes_touched"] == 2 * (m * k + n * k + m * n) + 4 * n
    bias_issued = 4 * n * 2 * 3 * 64 // 2  # each row of a tile reads its pairs of n
    assert launch["bytes_read"] == 2 * (2 * m * k + 3 * n * k) + bias_issued
    assert launch["bytes_written"] == 2 * m * n


def test_bank_conflicts_have_a_place(emulator):
    """Without the swizzle all eight rows of a matrix lie in the same banks."""
    gemm(emulator, torch.float16, 64, 64, 128, emulator.Fault.NO_SWIZZLE)
    (launch,) = emulator.take_launches()
    matrices = 2 * 4 * 4 * 4 * 4  # steps, chunk pairs, loads of a warp, warps, matrices of a load
    assert launch["bank_conflicts"] == 7 * matrices
    lines = (SOURCES / "gemm.cuh").read_text().splitlines()
    for place in launch["conflict_places"]:
        name, line = place.split(":")
        assert name == "gemm.cuh" and "load_matrices(" in lines[int(line) - 1]


def test_gemm_faults(emulator):
    fault = emulator.Fault
    for broken, message in (
        (fault.NO_WAIT, "cp.async without a wait"),
        (fault.NO_BARRIER, "race in shared memory"),
        (fault.NO_BARRIER_BEFORE_EPILOGUE, "race in shared memory"),
    ):
        for seed in range(5):
            emulator.set_settings(seed=seed)
            with pytest.raises(RuntimeError, match=message):
                gemm(emulator, torch.float16, 64, 64, 256, broken)


def test_gemm_speed(emulator):
    """At least 150 million multiply-accumulates a second on a core of one's own.

    In CPU time, which other processes do not take away. The limit leaves room for caches that are
    shared, and for processors without AVX2.
    """
    size = (784, 192, 480)
    gemm(emulator, torch.float16, *size)
    emulator.take_launches()
    best = 0.0
    for _ in range(3):
        started = time.process_time()
        gemm(emulator, torch.float16, *size)
        best = max(best, size[0] * size[1] * size[2] / (time.process_time() - started) / 1e6)
    conflicts = [launch["bank_conflicts"] for launch in emulator.take_launches()]
    print(f"{best:.0f} million MACs a second")
    assert conflicts == [0, 0, 0]
    assert best > 60


def test_exchanges(emulator):
    x = torch.randperm(32, generator=torch.Generator().manual_seed(0)).int()
    y = torch.full((9, 32), -1, dtype=torch.int32)
    emulator.exchanges(x.data_ptr(), y.data_ptr())
    lane = torch.arange(32)
    low = lane < 16
    up = torch.where(lane % 16 >= 2, lane - 2, lane)
    down = torch.where(lane + 3 < 32, lane + 3, lane)
    votes = sum(1 << i for i in range(32) if x[i] % 3 == 0)
    bits = torch.where(low, 0x0000AAAA, 0xCCCC0000)
    expected = [
        x[torch.full((32,), 5)],
        x[lane // 8 * 8 + (lane + 3) % 8],
        x[up],
        x[down],
        x[lane ^ 9],
        torch.full((32,), votes - (1 << 32) if votes >> 31 else votes),
        torch.full((32,), 1),
        torch.where(low, x[lane ^ 1], x[lane ^ 2]),
        torch.where(bits >= 1 << 31, bits - (1 << 32), bits),
    ]
    for row, values in zip(y, expected, strict=True):
        assert torch.equal(row, values.int())


@pytest.mark.parametrize("rounds", [1, 2, 3, 8])
def test_named_barriers(emulator, rounds):
    x = torch.arange(rounds * 32, dtype=torch.int32)
    for seed in range(50):
        emulator.set_settings(seed=seed)
        y = torch.full((rounds, 2, 32), -1, dtype=torch.int32)
        emulator.producer_and_consumers(x.data_ptr(), y.data_ptr(), rounds)
        assert torch.equal(y, 2 * x.view(rounds, 1, 32).expand_as(y))


@pytest.mark.parametrize("kind", ["transposed_b", "narrow", "tf32"])
def test_matrix_instructions(emulator, kind):
    """Small integers: every product and sum is exact."""
    generator = torch.Generator().manual_seed(1)
    dtype = torch.float32 if kind == "tf32" else torch.float16
    a = torch.randint(-9, 10, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-9, 10, (16, 8), generator=generator).to(dtype)
    stored = b if kind == "transposed_b" else b.T.contiguous()
    c = torch.full((16, 8), torch.nan)
    getattr(emulator, f"tile_{kind}")(a.data_ptr(), stored.data_ptr(), c.data_ptr())
    assert torch.equal(c, a.float() @ b.float())


def test_tf32_rounds_to_ten_bits(emulator):
    a, b = torch.zeros(16, 16), torch.zeros(8, 16)
    a[:, 0] = torch.tensor([1 + k * 2.0**-12 for k in range(16)])
    b[:, 0] = 1.0
    c = torch.empty(16, 8)
    emulator.tile_tf32(a.data_ptr(), b.data_ptr(), c.data_ptr())
    # To a multiple of 2^-10, ties away from zero.
    expected = torch.tensor([1 + (k + 2) // 4 * 2.0**-10 for k in range(16)])
    assert torch.equal(c, expected[:, None].expand(16, 8))


@pytest.mark.skipif(NVCC is None, reason="nvcc not installed")
@pytest.mark.parametrize("architecture", ["75", "80", "90a"])
def test_wrappers_compile_for_the_device(architecture, tmp_path):
    command = [NVCC, "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin"]
    command += [f"-DTEST_ARCHITECTURE={architecture.rstrip('a')}", str(SOURCES / "nvcc.cu")]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "test.cubin")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", result.stderr)
    assert spills and all(pair == ("0", "0") for pair in spills)
