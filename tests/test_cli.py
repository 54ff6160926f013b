"""The commands of ``python -m inception_ext``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inception_ext
from inception_ext import _library
from inception_ext._architectures import covering_architecture
from inception_ext._console import CommandError, Progress, require
from inception_ext.cli import _cuda, demo, info, main

SWITCHES = ("INCEPTION_EXT_DISABLE", "INCEPTION_EXT_REQUIRE", "INCEPTION_EXT_CUDA")


def run_python(*args: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter on the very package that the tests import."""
    root = str(Path(inception_ext.__file__).parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
    clean = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**clean, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
    )


# ---- info ----------------------------------------------------------------------------------------


def test_info_text(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"inception_ext {inception_ext.__version__}" in text
    assert torch.__version__ in text
    for section in ("Binary", "CUDA on this machine", "Paths", "Switches"):
        assert f"\n{section}\n" in text
    assert "reference" in text


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {
        "version", "python", "platform", "torch", "cpu", "binary", "cuda", "paths", "switches",
        "packages",
    }  # fmt: skip
    assert facts["binary"]["available"] is _library.is_available()
    assert {"error", "cuda", "architectures", "cpu_isa", "torch_built_with"} <= set(facts["binary"])
    assert set(facts["cuda"]) == {"nvcc", "driver", "devices"}
    assert [path["name"] for path in facts["paths"]] == ["CPU kernels", "CUDA kernels", "reference"]
    assert all(path["why"] for path in facts["paths"])


def test_info_keeps_the_reason_of_a_binary_that_does_not_load():
    code = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "inception_ext._C":
            raise ImportError("undefined symbol: blocked_by_the_test")
sys.meta_path.insert(0, Block())
warnings.simplefilter("ignore")
from inception_ext.cli import main
sys.exit(main(["info", *sys.argv[1:]]))
"""
    text = run_python("-c", code)
    assert text.returncode == 0, text.stderr
    assert "undefined symbol: blocked_by_the_test" in text.stdout
    assert "off CPU kernels" in text.stdout
    assert "plain PyTorch for everything" in text.stdout

    facts = json.loads(run_python("-c", code, "--json").stdout)
    assert facts["binary"]["available"] is False
    assert facts["binary"]["error"] == "undefined symbol: blocked_by_the_test"
    assert [path["active"] for path in facts["paths"]] == [False, False, True]


def test_info_shows_switches():
    done = run_python("-m", "inception_ext", "info", INCEPTION_EXT_DISABLE="1")
    assert done.returncode == 0, done.stderr
    assert "INCEPTION_EXT_DISABLE=1" in done.stdout
    assert "off CPU kernels" in done.stdout


def test_info_with_a_device_that_the_binary_does_not_cover(monkeypatch):
    device = {"name": "Some GPU", "capability": "3.5", "memory_gib": 4.0}
    monkeypatch.setattr(_cuda, "devices", lambda: [dict(device)])
    text = info.render(info.collect())
    assert "Some GPU, capability 3.5, 4.0 GiB: not covered by the binary" in text


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_80"], "8.0", "sm_80"),
        (["sm_80"], "8.6", "sm_80"),
        (["sm_80", "sm_86"], "8.9", "sm_86"),
        (["sm_86"], "8.0", None),
        (["sm_80"], "9.0", None),
        (["sm_90a"], "9.0", "sm_90a"),
        (["sm_90a"], "9.1", None),
        (["sm_100f"], "10.3", "sm_100f"),
        (["sm_100f"], "12.0", None),
        (["compute_80"], "12.0", "compute_80"),
        (["compute_120"], "10.0", None),
        (["compute_90a"], "10.0", None),
        (["compute_80", "sm_80", "compute_86"], "8.6", "sm_80"),
        (["sm_120", "compute_120"], "12.1", "sm_120"),
        ([], "9.0", None),
        (["nonsense"], "9.0", None),
    ],
)
def test_covering_architecture(architectures, capability, expected):
    assert covering_architecture(architectures, capability) == expected


def test_devices_of_a_torch_without_cuda_come_from_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    answer = "NVIDIA H100 80GB HBM3, 9.0, 81559\nOdd One, [N/A], 12\n"
    monkeypatch.setattr(_cuda, "_output", lambda command: answer)
    assert _cuda.devices() == [
        {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_gib": 79.6}
    ]


# ---- the command line ----------------------------------------------------------------------------


def test_usage_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command in ("demo", "explain", "export", "info", "predict", "train"):
        assert f"\n    {command} " in text
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_missing_extras_are_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main(["demo", "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == (
        "inception_ext demo: scikit-image missing; "
        'install with: pip install "inception_ext[demo]"\n'
    )
    assert not (tmp_path / "out").exists()


def test_require_accepts_what_is_there():
    require("demo", json="json")
    with pytest.raises(CommandError, match=r"nonesuch missing.*inception_ext\[extra\]"):
        require("extra", json="json", no_such_module="nonesuch")


def test_output_dir_that_cannot_be_made(tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert main(["demo", "--output-dir", str(blocker / "out")]) == 1
    assert "--output-dir" in capsys.readouterr().err


def test_progress_prints_plain_lines_away_from_a_terminal(capsys):
    with Progress(2, "work") as progress:
        progress.step("1")
        progress.line("a line")
    assert capsys.readouterr().out == "a line\n"


# ---- demo ----------------------------------------------------------------------------------------


def test_demo_quick(tmp_path):
    done = run_python(
        "-m", "inception_ext", "demo", "--quick", "--output-dir", str(tmp_path), timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["checks"]
    assert all(check["ok"] for check in summary["checks"])
    assert summary["results"]["photographs"]["names"] == ["astronaut", "chelsea"]
    assert set(summary["results"]["digits"]["accuracy"]) == {"main", "aux1", "aux2"}
    losses = summary["results"]["digits"]["losses"]
    assert set(losses) == {"total", "main", "aux1", "aux2"}
    for total, main_loss, aux1, aux2 in zip(*losses.values(), strict=True):
        assert total == pytest.approx(main_loss + 0.3 * (aux1 + aux2), rel=1e-5)
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "1. What is installed" in done.stdout


def test_demo_fails_where_a_check_fails(monkeypatch, capsys, tmp_path):
    pytest.importorskip("skimage")
    monkeypatch.setattr(demo, "_photographs", lambda report: report.check(True, "fine"))
    monkeypatch.setattr(demo, "_digits", lambda report, args: report.check(False, "too few"))
    assert main(["demo", "--output-dir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 checks passed" in text
    assert "FAILED too few" in text


def test_every_head_speaks_in_eval_mode():
    from inception_ext.cli._training import head_logits

    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(num_classes=4, init_weights=False).eval()
    x = torch.randn(3, 3, 32, 32)
    logits = head_logits(model.train(), x, batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        at_4a = model._to_4a(x)
        expected = {
            "main": model(x),
            "aux1": model.aux1(at_4a),
            "aux2": model.aux2(model._to_4d(at_4a)),
        }
    for name, want in expected.items():
        torch.testing.assert_close(logits[name], want)
    assert not any(module._forward_hooks for module in model.modules())


def test_digits_are_split_evenly_and_the_same_each_time():
    pytest.importorskip("sklearn")
    from inception_ext.cli._digits import load_digits

    digits, again = (load_digits(size=16, seed=3) for _ in range(2))
    assert digits.train_images.shape == (1437, 3, 16, 16)
    assert digits.test_images.shape == (360, 3, 16, 16)
    assert digits.train_images.is_contiguous(memory_format=torch.channels_last)
    assert digits.train_images.min() == -1
    assert digits.train_images.max() <= 1
    assert torch.equal(digits.test_images, again.test_images)
    assert digits.test_labels.bincount().min() >= 34


def test_training_repeats():
    from inception_ext.cli._training import Recipe, train

    images = torch.randn(11, 3, 32, 32)
    labels = torch.arange(11) % 3

    def losses() -> dict[str, list[float]]:
        torch.manual_seed(1)
        model = inception_ext.GoogLeNet(num_classes=3, init_weights=False)
        return train(model, images, labels, Recipe(epochs=2, batch_size=2), seed=5).losses

    first = losses()
    assert [len(values) for values in first.values()] == [10] * 4  # five full batches an epoch
    assert first == losses()


def test_smoothed_starts_without_bias():
    from inception_ext.training.curves import smoothed

    assert smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0]) == pytest.approx([0.0, 0.1 / 0.19])


def test_demo_says_when_others_hold_the_cores(monkeypatch, capsys):
    monkeypatch.setattr(demo, "cpu_in_use", lambda: (0.0, 512))
    demo._warn_of_company()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(demo, "cpu_in_use", lambda: (2.0, 2))
    demo._warn_of_company()
    assert "other programs hold 2.0 of 2 cores" in capsys.readouterr().out


def test_cpu_in_use_is_a_number_of_cores():
    from inception_ext.cli._timing import cpu_in_use

    busy, cores = cpu_in_use(0.05)
    assert cores >= 1
    assert 0 <= busy <= cores


def test_eager_twin_with_and_without_torchvision(monkeypatch):
    from inception_ext import _torchvision
    from inception_ext.cli._eager import eager_twin

    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(num_classes=4, init_weights=False, transform_input=True)
    model.double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    name, twin = eager_twin(model)
    assert name == "torchvision, eager"
    torch.testing.assert_close(twin(x), model(x))

    def fail() -> None:
        raise ImportError("No module named 'torchvision'")

    monkeypatch.setattr(_torchvision, "import_torchvision", fail)
    name, twin = eager_twin(model)
    assert name == "the reference path, eager"
    assert torch.equal(twin(x), model(x))
