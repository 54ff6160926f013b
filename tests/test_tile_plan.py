"""csrc/kernels/tile_plan: tests/cpp/tile_plan.cpp checks plans block by block; here it is run."""

import re
import shutil
from collections.abc import Mapping

import pytest
from test_cpu_sanitizers import BUILDS, ROOT, WARNINGS, compiler, environment, run

pytestmark = pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="no host C++ compiler")

SOURCES = [ROOT / "tests" / "cpp" / "tile_plan.cpp", ROOT / "csrc" / "kernels" / "tile_plan.cpp"]
MULTIPROCESSORS = 132
RESIDENT = {0: 2, 1: 3, 2: 3}  # blocks on a multiprocessor, by tile shape


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What the program prints, by build."""
    folder = tmp_path_factory.mktemp("tile_plan")
    printed = {}
    for name, flags in BUILDS.items():
        program = folder / name
        command = [*compiler(), "-std=c++20", *WARNINGS, "-Werror", *flags, f"-I{ROOT / 'csrc'}"]
        run([*command, *map(str, SOURCES), "-o", str(program)], environment())
        printed[name] = run([str(program)], environment())
    return printed


@pytest.mark.parametrize("build", BUILDS)
def test_plans(outputs, build):
    """Each element of C and step of K once, within every budget, for random groups."""
    last = outputs[build].splitlines()[-1]
    found = re.fullmatch(r"(\d+) checks, 0 failures", last)
    assert found and int(found[1]) > 100_000, last


def test_plans_are_the_same_in_every_build(outputs):
    assert len(set(outputs.values())) == 1


@pytest.mark.parametrize("batch", [1, 8, 128, 256])
def test_useful_share_of_googlenet(outputs, batch):
    """Of the multiply-accumulates that the nine modules issue, at least 0.90 count."""
    found = re.search(rf"^useful batch {batch} share ([\d.]+)$", outputs["plain"], re.MULTILINE)
    assert found is not None
    print(f"batch {batch}: useful share {found[1]}")
    assert float(found[1]) >= 0.90


def launches(output: str, batch: int) -> list[dict[str, int]]:
    """Of the eighteen launches of the modules: tile shape, blocks, most splits."""
    result = []
    for line in output.splitlines():
        if found := re.match(rf"plan batch {batch} .* shape (\d) blocks (\d+)", line):
            splits = max(map(int, re.findall(r"(\d+) splits", line)))
            result.append({"shape": int(found[1]), "blocks": int(found[2]), "splits": splits})
    assert len(result) == 18
    return result


def test_choices_for_googlenet(outputs):
    """One image gets small tiles and split sums where K is long; large batches neither."""
    one = launches(outputs["plain"], 1)
    assert {launch["shape"] for launch in one} == {2}
    assert max(launch["splits"] for launch in one) > 1
    assert all(launch["blocks"] <= RESIDENT[2] * MULTIPROCESSORS for launch in one)
    for batch in (128, 256):
        large = launches(outputs["plain"], batch)
        assert all(launch["blocks"] > MULTIPROCESSORS for launch in large)
        assert sum(launch["shape"] == 0 for launch in large) >= 16
