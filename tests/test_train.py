"""Training: recipe, loop, metrics, and the command."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from training_runs import epochs, last_checkpoint, make_images, steps, train

import inception_ext
from inception_ext.cli import main
from inception_ext.training import distributed
from inception_ext.training.metrics import COLUMNS
from inception_ext.training.network import HEADS, build_network, forward_heads, set_training
from inception_ext.training.recipe import Recipe, make_optimizer
from inception_ext.training.sync_batch_norm import SyncBatchNorm, convert


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


# ---- the recipe ----------------------------------------------------------------------------------


def test_cosine_after_a_warm_up():
    recipe = Recipe(epochs=10, lr=2.0, lr_warmup_epochs=2, lr_warmup_decay=0.25, lr_min=0.5)
    assert recipe.learning_rate(0) == 0.5
    assert recipe.learning_rate(1) == pytest.approx(1.25)
    assert recipe.learning_rate(2) == 2.0
    assert recipe.learning_rate(6) == pytest.approx(1.25)  # half way between lr and lr_min
    assert recipe.learning_rate(10) == pytest.approx(0.5)


def test_other_schedules():
    step = Recipe(lr=1.0, lr_scheduler="steplr", lr_step_size=3, lr_gamma=0.1)
    assert [step.learning_rate(e) for e in (0, 2.9, 3, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    exponential = Recipe(lr=1.0, lr_scheduler="exponentiallr", lr_gamma=0.5)
    assert [exponential.learning_rate(e) for e in (0.9, 1, 2)] == [1, 0.5, 0.25]
    assert Recipe(lr=1.0, lr_scheduler="constant").learning_rate(50) == 1.0


def test_the_cosine_is_that_of_torch():
    recipe = Recipe(epochs=5, lr=0.3, lr_min=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0.01)
    for epoch in range(5):
        assert recipe.learning_rate(epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_no_decay_on_norms_and_biases_by_choice():
    model = inception_ext.GoogLeNet(3, init_weights=False)
    recipe = Recipe(weight_decay=0.1, norm_weight_decay=0.0, bias_weight_decay=0.01)
    groups = {g["weight_decay"]: g["params"] for g in make_optimizer(recipe, model).param_groups}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in groups[0.0]} == {"bn"}
    assert all(names[id(p)].endswith("bias") for p in groups[0.01])
    assert all(p.dim() > 1 for p in groups[0.1])
    assert sum(map(len, groups.values())) == len(names)


@pytest.mark.parametrize(
    ("opt", "kind"),
    [
        ("sgd", torch.optim.SGD),
        ("sgd_nesterov", torch.optim.SGD),
        ("adamw", torch.optim.AdamW),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_optimizers(opt, kind):
    optimizer = make_optimizer(Recipe(opt=opt, lr=0.5), nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.5


# ---- the network ---------------------------------------------------------------------------------


def test_three_heads_in_eval_mode():
    model = build_network(Recipe(train_crop_size=32), 4).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = forward_heads(model, x)
        at_4a = model._to_4a(x)
        want = {
            "main": model(x),
            "aux1": model.aux1(at_4a),
            "aux2": model.aux2(model._to_4d(at_4a)),
        }
    assert set(logits) == set(HEADS)
    for head in HEADS:
        torch.testing.assert_close(logits[head], want[head])


def test_weights_of_another_width(tmp_path, capsys):
    torch.manual_seed(5)
    source = inception_ext.GoogLeNet(7, init_weights=True)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = build_network(Recipe(weights=str(tmp_path / "w.pth")), 3)
    assert torch.equal(
        model.inception5b.branch1.conv.weight, source.inception5b.branch1.conv.weight
    )
    assert model.fc.out_features == model.aux1.fc2.out_features == 3
    assert "6 dropped" in capsys.readouterr().out  # three classifiers, weight and bias


def test_published_weights_bring_their_input_transform(hub_dir, monkeypatch):
    state = inception_ext.GoogLeNet(1000, aux_logits=False, init_weights=False).state_dict()
    weights = inception_ext.GoogLeNet_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **kwargs: state)
    model = build_network(Recipe(weights="DEFAULT"), 5, quiet=True)
    assert model.transform_input
    assert torch.equal(model.conv1.conv.weight, state["conv1.conv.weight"])


def test_a_frozen_backbone_stays(tmp_path):
    recipe = Recipe(freeze_backbone=True)
    before = {k: v.clone() for k, v in build_network(recipe, 3).state_dict().items()}
    assert train(tmp_path, "--freeze-backbone", "--epochs", "1") == 0
    after = last_checkpoint(tmp_path)["model"]
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"fc", "aux1", "aux2"}
    model = build_network(recipe, 3)
    set_training(model, recipe)
    assert model.training
    assert model.dropout.training
    assert model.aux1.conv.bn.training
    assert not model.inception3a.branch1.bn.training


def test_without_auxiliary_losses_the_rest_starts_the_same(tmp_path):
    for weight in ("0", "0.3"):
        assert train(tmp_path / weight, "--aux-weight", weight, "--epochs", "1") == 0
    without, with_heads = steps(tmp_path / "0"), steps(tmp_path / "0.3")
    for head in HEADS:
        assert without[0][head] == with_heads[0][head]
    assert without[0]["loss"] == without[0]["main"]
    assert without[-1]["main"] != with_heads[-1]["main"]
    row = with_heads[0]
    assert row["loss"] == pytest.approx(row["main"] + 0.3 * (row["aux1"] + row["aux2"]), rel=1e-6)


# ---- a run ---------------------------------------------------------------------------------------


def test_what_a_run_leaves(tmp_path, capsys):
    assert train(tmp_path, "--print-freq", "2", "--tensorboard") == 0
    text = capsys.readouterr().out
    assert "\r" not in text
    assert "epoch 1  step 2/4  loss" in text
    assert "img/s" in text
    assert "epoch 2/2  train loss" in text

    header = (tmp_path / "steps.csv").read_text().splitlines()[0]
    assert header == ",".join(COLUMNS)
    rows = steps(tmp_path)
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["epoch"] for row in rows] == [0] * 4 + [1] * 4

    for number, epoch in enumerate(epochs(tmp_path)):
        own = rows[4 * number : 4 * number + 4]
        for name in ("loss", *HEADS, "accuracy_aux1"):
            assert epoch["train"][name] == pytest.approx(sum(row[name] for row in own) / 4)
        assert epoch["test"]["images"] == 3
        for head in HEADS:
            assert 0 <= epoch["test"][f"accuracy_{head}"] <= 1
            assert epoch["test"][f"loss_{head}"] > 0
    facts = json.loads((tmp_path / "epochs.json").read_text())
    assert facts["recipe"]["lr"] == 0.01
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    assert train(tmp_path, "--epochs", "1") == 0
    text = capsys.readouterr().out
    assert "epoch 1/1:" in text
    assert "\r" in text
    assert "aux2" in text
    assert "img/s" in text
    assert "step 2/" not in text


def test_the_test_is_that_of_the_saved_network(tmp_path, capsys):
    assert train(tmp_path) == 0
    assert train(tmp_path, "--test-only", "--resume") == 0
    result = json.loads((tmp_path / "test.json").read_text())
    assert result == epochs(tmp_path)[-1]["test"]
    model = inception_ext.googlenet(weights=str(max(tmp_path.glob("checkpoint-*.pt"))))
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    assert train(tmp_path / "other", "--test-only", "--weights", str(tmp_path / "plain.pth")) == 0
    assert json.loads((tmp_path / "other" / "test.json").read_text()) == result
    assert "main  accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ("--amp", "bf16", "--variant", "bvlc", "--lr-scheduler", "steplr"),
        ("--no-fused", "--no-channels-last", "--deterministic", "--opt", "adamw", "--lr", "1e-4"),
        ("--label-smoothing", "0.1", "--mixup-alpha", "1", "--dropout", "0", "--opt", "rmsprop"),
    ],
)
def test_options(options, tmp_path):
    assert train(tmp_path, *options, "--epochs", "1", "--synthetic-size", "8") == 0
    assert all(math.isfinite(row["loss"]) for row in steps(tmp_path))


def test_compile_is_asked_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model: asked.append(model) or model)
    assert train(tmp_path, "--compile", "--epochs", "1", "--synthetic-size", "8") == 0
    assert len(asked) == 1


def test_fused_and_eager_agree(tmp_path):
    """On the very same first batch; later steps amplify rounding."""
    options = ("--epochs", "1", "--synthetic-size", "8")
    for flag in ("--fused", "--no-fused"):
        assert train(tmp_path / flag, flag, *options) == 0
    fused, eager = (steps(tmp_path / flag)[0] for flag in ("--fused", "--no-fused"))
    for head in HEADS:
        assert fused[head] == pytest.approx(eager[head], rel=1e-4)


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    root = tmp_path / "images"
    make_images(root, each=4)
    folder = tmp_path / "run"
    options = ("-b", "4", "--train-crop-size", "32", "--threads", "1", "--lr", "1e30")
    options += ("--val-share", "0", "--epochs", "1", "--dropout", "0", "--workers", "0")
    assert main(["train", str(root), *options, "--output-dir", str(folder)]) == 1
    error = error_line(capsys)
    assert "step 1: loss nan" in error
    saved = torch.load(folder / "not-finite-00000001.pt", weights_only=True)
    names = saved["batch"]["names"]
    assert len(names) == 4
    assert all(name in error for name in names)
    assert all((root / name).exists() for name in names)
    assert saved["batch"]["images"].shape == (4, 3, 32, 32)
    assert saved["step"] == 1
    assert len(steps(folder)) == 1
    assert not list(folder.glob("checkpoint-*"))


# ---- wrong usage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "extra", "options"),
    [
        ("torchvision", "train", ()),
        ("matplotlib", "train", ()),
        ("tensorboard", "tensorboard", ("--tensorboard",)),
    ],
)
def test_missing_packages(module, extra, options, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert train(tmp_path, *options) == 1
    assert f'{module} missing; install with: pip install "inception_ext[{extra}]"' in error_line(
        capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "tpu"), "--device tpu"),
        (("--device", "cuda"), "no CUDA device"),
        (("--test-only",), "--test-only wants --resume or --weights"),
    ],
)
def test_what_cannot_be(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(tmp_path, *options) == 1
    assert message in error_line(capsys)


@pytest.mark.parametrize("options", [("--lr", "-1"), ("--epochs", "0"), ("--val-share", "1")])
def test_numbers_out_of_range(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, *options)
    assert stop.value.code == 2
    assert "should be" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run") == 1
    assert f"cannot make the folder {tmp_path / 'file' / 'run'}" in error_line(capsys)


def test_settings_survive_a_version_that_knows_fewer():
    values = {**Recipe(lr=3.0).as_dict(), "of_tomorrow": 1}
    assert Recipe.from_dict(values) == Recipe(lr=3.0)


# ---- batch norm over processes -------------------------------------------------------------------


def test_sync_batch_norm_alone_is_batch_norm(monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, group: None)
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, eps=1e-3).double()
    nn.init.uniform_(plain.weight)
    ours = convert(nn.BatchNorm2d(5, eps=1e-3).double(), torch.device("cpu"))
    assert type(ours) is SyncBatchNorm
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    results = []
    for norm in (plain, ours):
        own = x.clone().requires_grad_()
        y = norm(own)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append((y, own.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()))
        norm.eval()
        results[-1] += (norm(x),)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_alone_there_is_nobody_to_ask(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.World("cpu")
    assert world.is_main
    assert world.sum([1.5, 2]) == [1.5, 2]
    assert world.gather("a") == ["a"]
