"""``export``: ONNX, torch.export, AOTInductor."""

import sys
from pathlib import Path

import pytest
import torch
from engine_cases import assert_logits_as_good_as_the_models
from torch import nn

import inception_ext
from inception_ext.cli import export, main


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    torch.manual_seed(3)
    model = inception_ext.GoogLeNet(4, init_weights=False, transform_input=True)
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pt"
    sizes = {"resize": 48, "crop": 40, "transform_input": True}
    torch.save({"model": model.state_dict(), "classes": list("abcd"), "input": sizes}, path)
    return str(path)


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_onnx_in_its_runtime(weights, tmp_path, capsys):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "sub" / "net.onnx"
    command = ["export", "--weights", weights, "--output", str(path), "--dynamic-batch"]
    assert main(command) == 0
    assert "any number of images of 40 x 40" in capsys.readouterr().out
    onnx.checker.check_model(str(path))
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = inception_ext.googlenet(weights=weights, transform_input=True).eval()
    for count in (1, 4):
        images = torch.randn(count, 3, 40, 40)
        (logits,) = session.run(None, {"images": images.numpy()})
        assert_logits_as_good_as_the_models(torch.from_numpy(logits), model, images)


def test_torch_export_has_none_of_our_ops(weights, tmp_path):
    path = tmp_path / "net.pt2"
    command = ["export", "--weights", weights, "--output", str(path), "--format", "torch"]
    assert main([*command, "-b", "2", "--size", "48"]) == 0
    program = torch.export.load(path)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("convolution" in target or "conv2d" in target for target in targets)
    assert not any("inception_ext" in target for target in targets)
    assert not any(name.startswith("aux") for name in program.state_dict)
    model = inception_ext.googlenet(weights=weights, transform_input=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert_logits_as_good_as_the_models(program.module()(images), model, images)


class Small(nn.Module):
    """Compiles in seconds; a GoogLeNet takes a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3))


def test_aot_inductor(tmp_path):
    path = tmp_path / "net.aoti.pt2"
    model = Small().eval()
    call = export.FORMATS["aoti"](model, torch.randn(2, 3, 8, 8), False, path)
    assert path.stat().st_size > 0
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(call(x), model(x).detach())


def test_what_differs_is_an_error(weights, tmp_path, monkeypatch, capsys):
    def wrong(model: nn.Module, images: torch.Tensor, dynamic: bool, path: Path) -> export.Call:
        path.write_bytes(b"something")
        return lambda x: 1.1 * model(x).detach()

    monkeypatch.setitem(export.FORMATS, "torch", wrong)
    path = tmp_path / "net.pt2"
    assert main(["export", "--weights", weights, "--output", str(path), "--format", "torch"]) == 1
    assert "differs from the network by 1.0e-01" in error_line(capsys)


def test_what_cannot_be_written(weights, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> export.Call:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export.FORMATS, "torch", full)
    path = tmp_path / "net.pt2"
    assert main(["export", "--weights", weights, "--output", str(path), "--format", "torch"]) == 1
    assert f"cannot write {path}: No space left on device" in error_line(capsys)
    assert main(["export", "--weights", str(tmp_path / "none.pt"), "--format", "torch"]) == 1
    assert "no checkpoint at" in error_line(capsys)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_packages_are_optional(package, weights, monkeypatch, capsys):
    """Named with those that cannot be imported without it."""
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "--weights", weights]) == 1
    what, how = error_line(capsys).split(" missing; ")
    assert package in what.removeprefix("inception_ext export: ").split(", ")
    assert how.strip() == 'install with: pip install "inception_ext[export]"'
