"""``explain``: gradient flow, softmaxes, topology."""

import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from training_runs import make_images

import inception_ext
from inception_ext._blocks import Exits, measure_blocks, measure_exits
from inception_ext.cli import main
from inception_ext.explain import gradient_flow, softmaxes, topology
from inception_ext.training.batches import Batches
from inception_ext.training.data import open_data
from inception_ext.training.distributed import World
from inception_ext.training.network import HEADS, build_network
from inception_ext.training.recipe import Recipe


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ---- blocks --------------------------------------------------------------------------------------


def test_work_and_parameters_are_the_known_ones():
    model = inception_ext.GoogLeNet(1000, init_weights=False)
    blocks = measure_blocks(model, 224)
    exits = measure_exits(model, 224)
    assert exits.plain == pytest.approx(2.997e9, rel=1e-3)
    assert sum(b.parameters for b in blocks.values()) == 13_004_888
    assert blocks["inception4a"].shape == (512, 14, 14)
    assert blocks["inception5b"].shape == (1024, 7, 7)
    assert blocks["conv1"].flops == 2 * 112 * 112 * 64 * 3 * 49
    assert exits.aux1 < exits.aux2 < exits.main
    assert exits.main - exits.plain == blocks["aux1"].flops + blocks["aux2"].flops
    assert not any(p.is_meta for p in model.parameters())


# ---- gradient flow -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flow():
    recipe = Recipe(
        synthetic=True, synthetic_size=8, num_classes=3, batch_size=4, train_crop_size=32, lr=0.01
    )
    return recipe, gradient_flow.measure(recipe, 2)


def test_the_first_gradient_is_that_of_backward(flow):
    recipe, result = flow
    batch = next(iter(Batches(open_data(recipe), recipe, World("cpu")).train(0)))
    for side, weight in (("with", 0.3), ("without", 0.0)):
        model = build_network(recipe, 3).train()
        inception_ext.GoogLeNetLoss(weight)(model(batch.images), batch.labels).backward()
        for name in ("conv1", "inception3a", "inception4d", "inception5b", "fc"):
            gradients = [p.grad.flatten() for p in getattr(model, name).parameters()]
            want = torch.cat(gradients).norm().item()
            assert result[side]["norms"][name][0] == pytest.approx(want, rel=1e-3)


def test_parts_add_up(flow):
    _, result = flow
    assert result["modules"][0] == "conv1"
    assert len(result["with"]["norms"]["inception3a"]) == 2
    for name in ("inception3a", "inception4a", "inception4e"):
        own = gradient_flow.shares(result, name)
        for kind in ("norm", "along"):
            assert sum(own[head][kind] for head in HEADS) == pytest.approx(1, rel=1e-4)
    assert gradient_flow.shares(result, "inception3a")["aux1"]["norm"] > 0
    # No auxiliary loss reaches what comes after its head.
    assert gradient_flow.shares(result, "inception4b")["aux1"]["norm"] == 0
    assert gradient_flow.shares(result, "inception4e")["main"]["norm"] == 1
    assert gradient_flow.shares(result, "aux2")["aux2"]["norm"] == 1
    assert result["without"]["norms"]["aux1"] == [0.0] * 2


def test_both_start_the_same_and_part(flow):
    _, result = flow
    with_heads, without = result["with"]["losses"]["main"], result["without"]["losses"]["main"]
    assert with_heads[0] == without[0]
    assert with_heads[1] != without[1]


def test_gradient_flow_command(tmp_path, capsys):
    options = ("--synthetic", "--num-classes", "3", "-b", "2", "--train-crop-size", "32")
    status = main(
        ["explain", "gradient-flow", *options, "--steps", "1", "--variant", "bvlc",
         "--output-dir", str(tmp_path)]
    )  # fmt: skip
    assert status == 0
    text = capsys.readouterr().out
    assert re.search(r"3a's gradient: \d+% from main, \d+% from aux1, \d+% from aux2 by norm", text)
    assert re.search(r"inception4a +\S+ +\S+ +\S+x", text)
    result = json.loads((tmp_path / "gradient_flow.json").read_text())
    assert result["shares"]["inception3a"].keys() == set(HEADS)
    assert (tmp_path / "gradient_flow.png").read_bytes().startswith(b"\x89PNG")


# ---- softmaxes -----------------------------------------------------------------------------------


def test_calibration_of_known_confidences():
    # Four images at confidence 0.9 of which three are right; two at 0.6, both wrong.
    p = torch.tensor([0.9] * 4 + [0.6] * 2, dtype=torch.float64)
    logits = torch.stack([p, 1 - p], 1).log()
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    own = softmaxes.calibration(logits, labels)
    assert own["accuracy"] == 0.5
    assert own["confidence"] == pytest.approx(0.8)
    assert own["ece"] == pytest.approx((4 * 0.15 + 2 * 0.6) / 6)
    assert own["loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert [b["images"] for b in own["bins"]] == [2, 4]


def test_early_exits_of_known_confidences():
    def head(*confidences):
        p = torch.tensor(confidences, dtype=torch.float64)
        return torch.stack([p, 1 - p], 1).log()

    logits = {
        "aux1": head(0.95, 0.6, 0.6, 0.3),
        "aux2": head(0.95, 0.92, 0.7, 0.7),
        "main": head(0.99, 0.99, 0.99, 0.99),
    }
    labels = torch.tensor([0, 1, 0, 0])
    rows = softmaxes.early_exits(logits, labels, Exits(aux1=40, aux2=80, main=110, plain=100))
    by_threshold = {row["threshold"]: row for row in rows}
    everyone = by_threshold[0.0]
    assert everyone["left"] == {"aux1": 1.0, "aux2": 0.0, "main": 0.0}
    assert everyone["work"] == pytest.approx(0.4)
    assert everyone["accuracy"] == 0.5  # the second and the fourth are wrong at aux1
    middle = by_threshold[0.9]
    assert middle["left"] == {"aux1": 0.25, "aux2": 0.25, "main": 0.5}
    assert middle["work"] == pytest.approx((0.4 + 0.8 + 2 * 1.1) / 4)
    assert middle["accuracy"] == 0.75
    nobody = by_threshold[1.01]
    assert nobody["left"]["main"] == 1
    assert nobody["work"] == pytest.approx(1.1)
    assert nobody["accuracy"] == 0.75


def test_softmaxes_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = inception_ext.GoogLeNet(2, init_weights=True)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    paths = make_images(tmp_path / "images" / "train", each=1)
    make_images(tmp_path / "images" / "val", each=3)
    (tmp_path / "images" / "val" / "class0" / "bad.png").write_text("")
    command = ["explain", "softmaxes", str(tmp_path / "images"), "-b", "4"]
    command += ["--output-dir", str(tmp_path / "out")]
    assert main([*command, "--weights", str(tmp_path / "w.pth")]) == 0
    text = capsys.readouterr().out
    assert "skipped" in text
    assert "bad.png" in text
    result = json.loads((tmp_path / "out" / "softmaxes.json").read_text())
    assert result["images"] == 6
    assert result["heads"]["main"]["accuracy"] == 0.5  # untrained: the same class for all
    assert result["exits"][0]["left"]["aux1"] == 1
    assert (tmp_path / "out" / "softmaxes.png").read_bytes().startswith(b"\x89PNG")

    headless = {k: v for k, v in model.state_dict().items() if not k.startswith("aux")}
    torch.save(headless, tmp_path / "headless.pth")
    assert main([*command, "--weights", str(tmp_path / "headless.pth")]) == 1
    assert "holds no auxiliary heads" in error_line(capsys)
    assert main([*command, "--weights", str(tmp_path / "none.pth")]) == 1
    assert f"no checkpoint at {tmp_path / 'none.pth'}" in error_line(capsys)
    assert paths


# ---- topology ------------------------------------------------------------------------------------


def test_launches_of_both_variants():
    groups = topology.launches(inception_ext.GoogLeNet(10, init_weights=False).eval())
    assert groups[:3] == [
        ["conv1", "maxpool1"],
        ["conv2", "conv3", "maxpool2"],
        ["inception3a.1"],
    ]
    assert len(groups) == 2 + 9 * 2 + 2  # the stem, nine modules, two pools between them
    paper = topology.launches(inception_ext.bvlc_googlenet(10, init_weights=False).eval())
    assert paper[0] == ["conv1", "maxpool1"]
    assert ["lrn1"] in paper


@pytest.mark.parametrize("variant", ["torchvision", "bvlc"])
def test_topology_command(variant, tmp_path, capsys):
    options = ["--variant", variant, "--num-classes", "7", "--size", "96"]
    assert main(["explain", "topology", *options, "--output-dir", str(tmp_path)]) == 0
    svg = (tmp_path / "topology.svg").read_text()
    assert svg.startswith("<?xml")
    assert (tmp_path / "topology.png").read_bytes().startswith(b"\x89PNG")
    comments = re.findall(r"<!-- (.*?) -->", svg)  # matplotlib's texts
    for text in ("softmax: aux1", "softmax: aux2", "softmax: main", "inception4e", "480 x 12 x 12"):
        assert text in comments
    if variant == "torchvision":
        assert "156 k parameters" in comments
    assert "inception3a" in capsys.readouterr().out


def test_topology_of_a_size_that_cannot_be(tmp_path, capsys):
    assert main(["explain", "topology", "--size", "8", "--output-dir", str(tmp_path)]) == 1
    assert "--size 8:" in error_line(capsys)


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["explain", "topology"]) == 1
    assert 'matplotlib missing; install with: pip install "inception_ext[train]"' in error_line(
        capsys
    )
