"""The package in processes of its own: turned off, or without its binary."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gate_cases import (
    X,
    without_kernels,
)

import inception_ext
from inception_ext import _library


def run_python(code: str, path: Path | None = None, **environment: str) -> SimpleNamespace:
    """Runs code, with the package of the given directory or the one that is tested here."""
    root = path or Path(inception_ext.__file__).parents[1]
    # An editable install would find, in its own directory, what is missing here.
    no_editable = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{no_editable}\n{code}"],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}:{Path(__file__).parent}",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return SimpleNamespace(code=result.returncode, out=result.stdout, err=result.stderr)


RUN_A_BLOCK = """
import os, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import inception_ext
    import inception_ext.functional
import torch
from fast_path import CalledOps
from inception_ext import _library, functional
ours = [w for w in caught if "inception_ext" in str(w.message)]
assert inception_ext.__file__.startswith(os.getcwd()), inception_ext.__file__
state, x, expected = torch.load(os.environ["CASE"])
block = inception_ext.Inception(16, 8, 8, 12, 4, 8, 8)
block.load_state_dict(state)
with CalledOps() as called:
    y = block(x)
    y.sum().backward()
assert called.names == []
torch.testing.assert_close(y.detach(), expected)
"""


@pytest.fixture
def case(tmp_path, block) -> str:
    """A file with a block's state, an input and the output in training."""
    state = {k: v.clone() for k, v in block.state_dict().items()}
    expected = without_kernels(lambda: block(X)).detach()
    torch.save((state, X, expected), tmp_path / "case.pt")
    return str(tmp_path / "case.pt")


def test_disabled_by_the_environment(case):
    code = RUN_A_BLOCK + (
        "assert not ours and _library.is_available()\nprint(functional.why_unavailable())\n"
    )
    result = run_python(code, CASE=case, INCEPTION_EXT_DISABLE="1")
    assert result.code == 0, result.err
    assert "INCEPTION_EXT_DISABLE=1" in result.out


@pytest.fixture
def unbuilt(tmp_path) -> Path:
    """The package without its binary."""
    source = Path(inception_ext.__file__).parent
    shutil.copytree(
        source, tmp_path / "inception_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_without_the_binary(case, unbuilt):
    code = RUN_A_BLOCK + (
        "[warning] = ours\n"
        "assert warning.category is RuntimeWarning, warning\n"
        "assert not _library.is_available() and '_C' in _library.load_error()\n"
        "assert functional.why_unavailable() in repr(block) and 'missing' in repr(block)\n"
        "assert not hasattr(torch.ops.inception_ext, 'max_pool_forward')\n"
        "info = _library.build_info()\n"
        "assert info['version'] == inception_ext.__version__ and info['cuda'] is None\n"
        "model = inception_ext.googlenet(num_classes=10, init_weights=False)\n"
        "model(torch.randn(2, 3, 64, 64)).logits.sum().backward()\n"
        "assert inception_ext.freeze(model)(torch.randn(1, 3, 64, 64)).shape == (1, 10)\n"
    )
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err


def test_without_the_binary_where_it_is_required(unbuilt):
    result = run_python("import inception_ext", unbuilt, INCEPTION_EXT_REQUIRE="1")
    assert result.code == 1
    assert "ImportError: inception_ext: the compiled kernels are missing" in result.err
    assert "INCEPTION_EXT_REQUIRE=1" in result.err


def test_a_binary_that_does_not_load(case, unbuilt):
    (unbuilt / "inception_ext" / "_C.abi3.so").write_bytes(b"no library")
    code = RUN_A_BLOCK + "assert len(ours) == 1\nprint(_library.load_error())\n"
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err
    assert "_C.abi3.so" in result.out


def test_a_binary_of_other_sources(case, unbuilt):
    """One that lacks an op, as after a pull without a build."""
    shutil.copy(_library._C.__file__, unbuilt / "inception_ext")
    fakes = unbuilt / "inception_ext" / "_fake_kernels.py"
    sources = fakes.read_text()
    newer = sources.replace('("max_pool_forward",', '("a_new_op",')
    assert newer != sources
    fakes.write_text(newer)
    code = RUN_A_BLOCK + "assert len(ours) == 1\nprint(_library.load_error())\n"
    result = run_python(code, unbuilt, CASE=case)
    assert result.code == 0, result.err
    assert "was built from other sources" in result.out and "a_new_op" in result.out
