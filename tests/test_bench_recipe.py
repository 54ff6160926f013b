"""The benchmark of the training recipe: its plan, and the README's section out of its results."""

import importlib
import json
from pathlib import Path

import pytest

from inception_ext.cli import _commands

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "recipe-digits.json"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_recipe")


def test_every_run_is_a_command_that_parses(bench):
    import argparse

    plan = bench.commands(threads=1)
    assert len(plan) == 2 * 3 + 2 + 2 * 3
    for arguments in plan.values():
        parser = argparse.ArgumentParser()
        _commands()[arguments[0]].add_arguments(parser)
        args = parser.parse_args([*arguments[1:], "--output-dir", "x"])
        assert args.threads == 1
    assert plan["without-2"][-6:] == ["--seed", "2", "--aux-weight", "0", "--threads", "1"]


def test_a_finished_run_is_not_run_again(bench, tmp_path, monkeypatch):
    (tmp_path / "epochs.json").write_text(json.dumps({"recipe": {"epochs": 2}, "epochs": [{}]}))
    assert not bench.is_finished(tmp_path)
    (tmp_path / "epochs.json").write_text(json.dumps({"recipe": {"epochs": 2}, "epochs": [{}, {}]}))
    assert bench.is_finished(tmp_path)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("it ran"))
    bench.run(["train"], tmp_path)


def test_the_readme_says_what_was_measured(bench):
    result = json.loads(RESULT.read_text())
    assert {run["name"] for run in result["training"]} == {
        name for name in result["commands"] if name.startswith(("with", "eager", "nchw"))
    }
    text = (ROOT / "README.md").read_text()
    section = text.split("recipe-digits.json -->\n")[1].split("<!-- end -->")[0]
    assert section == bench.render(result) + "\n\n"
