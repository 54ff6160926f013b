"""``predict``, and the networks that it finds in files."""

import json
import sys

import numpy as np
import pytest
import torch
from training_runs import SMALL, make_images

import inception_ext
from inception_ext.cli import main
from inception_ext.trained import load_trained

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A checkpoint with names of classes, for images of 48 x 48 cropped to 40."""
    torch.manual_seed(3)
    model = inception_ext.GoogLeNet(4, init_weights=False)
    torch.nn.init.normal_(model.fc.weight)
    path = tmp_path_factory.mktemp("weights") / "checkpoint.pt"
    torch.save(
        {
            "model": model.state_dict(),
            "classes": ["ant", "bee", "cat", "dog"],
            "input": {"resize": 48, "crop": 40, "transform_input": False},
        },
        path,
    )
    return str(path)


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_the_classes_are_those_of_the_model(weights, tmp_path, capsys):
    paths = make_images(tmp_path, classes=1, each=3, size=60)
    command = ["predict", str(tmp_path), "--weights", weights, "--json", "-k", "2", "-b", "2"]
    assert main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(path) for path in paths]

    model = inception_ext.googlenet(weights=weights).eval()
    prepare = inception_ext.GoogLeNet_Weights.DEFAULT.transforms(crop_size=40, resize_size=48)
    for path, line in zip(paths, lines, strict=True):
        with torch.no_grad():
            scores = model(prepare(Image.open(path))[None]).softmax(1)[0]
        top = scores.topk(2)
        assert [entry["index"] for entry in line["top"]] == top.indices.tolist()
        assert [entry["class"] for entry in line["top"]] == [
            ["ant", "bee", "cat", "dog"][i] for i in top.indices
        ]
        for entry, p in zip(line["top"], top.values.tolist(), strict=True):
            assert entry["probability"] == pytest.approx(p, abs=1e-4)


def test_lines_for_people(weights, tmp_path, capsys):
    (path,) = make_images(tmp_path, classes=1, each=1)
    assert main(["predict", str(path), "--weights", weights]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{path}: ")
    assert line.count("%") == 4  # four classes, though five were asked for


def test_uint8_goes_to_the_engine(weights, tmp_path, monkeypatch):
    (path,) = make_images(tmp_path, classes=1, each=1)
    seen = []
    call = inception_ext.Engine.__call__
    monkeypatch.setattr(
        inception_ext.Engine, "__call__", lambda self, x: seen.append(x) or call(self, x)
    )
    assert main(["predict", str(path), "--weights", weights]) == 0
    assert (seen[0].dtype, seen[0].shape) == (torch.uint8, (1, 3, 40, 40))


def test_early_exit(weights, tmp_path, capsys):
    make_images(tmp_path, classes=1, each=3)
    command = ["predict", str(tmp_path), "--weights", weights, "--early-exit", "0.01"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].startswith("3 images left: 3 at aux1, 0 at aux2, 0 at main; ")


def test_modes_and_formats(weights, tmp_path, capsys):
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (50, 70), dtype=np.uint8))
    grey.save(tmp_path / "grey.jpg")
    grey.convert("P").save(tmp_path / "palette.gif")
    grey.convert("RGBA").save(tmp_path / "transparent.png")
    grey.convert("CMYK").save(tmp_path / "print.tiff")
    assert main(["predict", str(tmp_path), "--weights", weights]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_unreadable_files_are_named_and_skipped(weights, tmp_path, capsys):
    paths = make_images(tmp_path, classes=1, each=3)
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("no image")
    command = ["predict", str(tmp_path), str(tmp_path / "notes.txt"), "--weights", weights]
    assert main(command) == 1
    out, error = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [str(paths[0]), str(paths[2])]
    assert f"skipped {paths[1]}: " in error
    assert f"skipped {tmp_path / 'notes.txt'}: cannot identify" in error


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("none.png", "none.png: no such file or folder"),
        ("empty", "empty: no images in this folder"),
    ],
)
def test_nothing_to_read(what, message, weights, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / what), "--weights", weights]) == 1
    assert message in error_line(capsys)


def test_weights_that_are_wrong(weights, tmp_path, capsys):
    (path,) = make_images(tmp_path, classes=1, each=1)
    assert main(["predict", str(path), "--weights", str(tmp_path / "none.pt")]) == 1
    assert "no checkpoint at" in error_line(capsys)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    assert main(["predict", str(path), "--weights", str(tmp_path / "other.pt")]) == 1
    assert "is not of a GoogLeNet: no 'fc.weight'" in error_line(capsys)
    assert main(["predict", str(path), "--weights", weights, "--averaged"]) == 1
    assert "holds no averaged weights" in error_line(capsys)
    assert main(["predict", str(path), "--weights", weights, "--dtype", "float16"]) == 1
    assert "expected torch.float32 or torch.bfloat16 on cpu" in error_line(capsys)


def test_pillow_is_optional(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["predict", "x.png", "--weights", weights]) == 1
    assert 'pillow missing; install with: pip install "inception_ext[predict]"' in error_line(
        capsys
    )


# ---- networks in files ---------------------------------------------------------------------------


def test_what_train_leaves_can_be_used(tmp_path, capsys):
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    run = tmp_path / "run"
    command = [*SMALL, "--output-dir", str(run), "--epochs", "1", "--synthetic-size", "8"]
    try:
        assert main([*command, "--model-ema", "--model-ema-steps", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    path = str(max(run.glob("checkpoint-*.pt")))
    content = torch.load(path, weights_only=True)
    for averaged, key in ((False, "model"), (True, "ema")):
        trained = load_trained(path, averaged)
        assert trained.classes == ["class 0", "class 1", "class 2"]
        assert (trained.resize, trained.crop) == (32, 32)
        assert not trained.model.training
        for name, value in trained.model.state_dict().items():
            assert torch.equal(value, content[key][name])


def test_every_kind_of_network(tmp_path):
    for model in (
        inception_ext.GoogLeNet(3, init_weights=False, branch3_kernel_size=5),
        inception_ext.GoogLeNet(3, init_weights=False, aux_logits=False),
        inception_ext.bvlc_googlenet(3),
    ):
        torch.save(model.state_dict(), tmp_path / "w.pth")
        found = load_trained(str(tmp_path / "w.pth"))
        assert type(found.model) is type(model)
        assert (found.model.aux1 is None) == (model.aux1 is None)
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(found.model(x), model.eval()(x))
        assert found.classes == ["class 0", "class 1", "class 2"]


def test_published_weights(monkeypatch, tmp_path):
    state = inception_ext.GoogLeNet(1000, aux_logits=False, init_weights=False).state_dict()
    weights = inception_ext.GoogLeNet_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **kwargs: state)
    by_name = load_trained("DEFAULT")
    torch.save(state, tmp_path / "googlenet-1378be20.pth")
    by_file = load_trained(str(tmp_path / "googlenet-1378be20.pth"))
    for trained in (by_name, by_file):
        assert trained.model.transform_input
        assert trained.classes[0] == "tench"
        assert (trained.resize, trained.crop) == (256, 224)
