"""What a training run reads: folders, digits, shards; what cannot be read; order and mixing."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import epochs, make_images, steps

from inception_ext._console import CommandError
from inception_ext.cli import main
from inception_ext.training import transforms
from inception_ext.training.batches import Batches
from inception_ext.training.data import Digits, Synthetic, open_data
from inception_ext.training.distributed import World
from inception_ext.training.recipe import Recipe
from inception_ext.training.seeds import generator, seeded
from inception_ext.training.transforms import Sizes, batch_mixer, train_transform

SMALL = ("--train-crop-size", "32", "-b", "2", "--epochs", "1", "--lr", "0.01", "--workers", "0")


def train(data: object, folder: Path, *options: str) -> int:
    return main(["train", str(data), *SMALL, "--output-dir", str(folder), *options])


def error_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def batches(recipe: Recipe) -> Batches:
    return Batches(open_data(recipe), recipe, World("cpu"))


# ---- randomness ----------------------------------------------------------------------------------


def test_seeded_leaves_the_generator_as_it_was():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    with seeded(1, 2):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), want)
    with seeded(1, 2):
        assert torch.equal(torch.rand(3), first)
    with seeded(2, 1):
        assert not torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=generator(1, 2)), first)


def test_an_image_is_the_same_whatever_came_before(tmp_path):
    make_images(tmp_path, each=6)
    recipe = Recipe(data=str(tmp_path), batch_size=2, train_crop_size=32, workers=0, val_share=0.0)
    loader = batches(recipe)
    assert loader.steps_per_epoch == 6
    whole = list(loader.train(epoch=3))
    rest = list(loader.train(epoch=3, done=4))
    assert [b.names for b in whole[4:]] == [b.names for b in rest]
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], rest, strict=True))
    assert sorted(name for b in whole for name in b.names) == sorted(
        str(path) for path in tmp_path.glob("*/*.png")
    )
    other = list(loader.train(epoch=4))
    assert [b.names for b in whole] != [b.names for b in other]
    assert not torch.equal(whole[0].images, other[0].images)


# ---- folders -------------------------------------------------------------------------------------


def test_train_and_val_folders(tmp_path):
    make_images(tmp_path / "train", classes=3, each=2)
    make_images(tmp_path / "val", classes=2, each=1)
    data = open_data(Recipe(data=str(tmp_path)))
    assert data.classes == ["class0", "class1", "class2"]
    assert (len(data.train), len(data.test)) == (6, 2)
    image, label = data.test.load(1)
    assert (image.mode, image.size, label) == ("RGB", (48, 40), 1)


def test_one_folder_is_divided_evenly_and_the_same_each_time(tmp_path):
    make_images(tmp_path, classes=2, each=10)
    one, two = (open_data(Recipe(data=str(tmp_path), val_share=0.3, seed=s)) for s in (0, 1))
    assert one.test.files == two.test.files
    assert [label for _, label in one.test.files] == [0] * 3 + [1] * 3
    assert not set(one.test.files) & set(one.train.files)
    assert len(one.train) + len(one.test) == 20


def test_more_classes_than_the_data_has(tmp_path, capsys):
    make_images(tmp_path, classes=2)
    data = open_data(Recipe(data=str(tmp_path), num_classes=4))
    assert data.classes == ["class0", "class1", "class 2", "class 3"]
    assert train(tmp_path, tmp_path / "run", "--num-classes", "1") == 1
    assert "--num-classes 1, but the data has 2" in error_line(capsys)


def test_corrupt_images_are_skipped_counted_and_named(tmp_path, capsys):
    root = tmp_path / "images"
    paths = make_images(root / "train", classes=2, each=4)
    make_images(root / "val", classes=2, each=1)
    good = paths[0].read_bytes()
    paths[0].write_bytes(good[: len(good) // 2])
    paths[5].write_text("no image at all")
    (root / "val" / "class0" / "0.png").write_bytes(b"")
    folder = tmp_path / "run"
    assert train(root, folder, "-b", "4") == 0
    text = capsys.readouterr().out
    for path in (paths[0], paths[5], root / "val" / "class0" / "0.png"):
        assert text.count(f"skipped {path}: ") == 1
    assert "image file is truncated" in text
    assert "2 unreadable" in text
    (epoch,) = epochs(folder)
    assert epoch["train"]["skipped"] == 2
    assert epoch["train"]["images"] == 6
    assert epoch["test"]["images"] == 1
    skipped = json.loads((folder / "epochs.json").read_text())["skipped"]
    assert set(skipped) == {str(paths[0]), str(paths[5]), str(root / "val" / "class0" / "0.png")}


def test_a_batch_that_is_left_with_too_little_is_no_step(tmp_path):
    root = tmp_path / "images"
    paths = make_images(root, classes=2, each=4)
    paths[3].write_text("")
    folder = tmp_path / "run"
    assert train(root, folder, "--val-share", "0") == 0
    assert len(steps(folder)) == 3
    assert epochs(folder)[0]["step"] == 4


def test_when_nothing_can_be_read(tmp_path, capsys):
    root = tmp_path / "images"
    for path in make_images(root):
        path.write_text("")
    assert train(root, tmp_path / "run", "--val-share", "0") == 1
    assert f"no batch could be read ({root}" in error_line(capsys)


def test_images_that_vanish_during_the_run(tmp_path, capsys):
    root = tmp_path / "images"
    paths = make_images(root, each=4)
    recipe = Recipe(data=str(root), batch_size=8, train_crop_size=32, workers=0, val_share=0.0)
    loader = batches(recipe)
    paths[2].unlink()
    (batch,) = loader.train(0)
    assert len(batch) == 7
    assert [name for name, _ in batch.skipped] == [str(paths[2])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "{0}: no such folder"),
        (lambda p: p.write_text(""), "{0}: a file, but DATA is a folder"),
        (lambda p: p.mkdir(), "{0}: no folders in it"),
        (lambda p: (p / "cats").mkdir(parents=True), "{0}: no images in its 1 folders"),
    ],
    ids=["missing", "a file", "empty", "no images"],
)
def test_wrong_folders(make, message, tmp_path, capsys):
    root = tmp_path / "data"
    make(root)
    assert train(root, tmp_path / "run") == 1
    assert message.format(root) in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_classes_that_training_does_not_know(tmp_path, capsys):
    make_images(tmp_path / "train", classes=1)
    make_images(tmp_path / "val", classes=2)
    assert train(tmp_path, tmp_path / "run") == 1
    assert "class class1 is not among those of" in error_line(capsys)
    assert train(tmp_path, tmp_path / "run", "--val-data", str(tmp_path / "none")) == 1
    assert f"{tmp_path / 'none'}: no such folder" in error_line(capsys)


def test_no_data_at_all(tmp_path, capsys):
    assert main(["train", "--output-dir", str(tmp_path / "run")]) == 1
    assert "no data" in error_line(capsys)


# ---- digits and synthetic images -----------------------------------------------------------------


def test_digits_are_divided_evenly():
    pytest.importorskip("sklearn")
    train_part, test_part = Digits.split(0.2)
    assert (len(train_part), len(test_part)) == (1437, 360)
    assert test_part.labels.bincount().min() >= 35
    numbers = torch.cat([train_part.numbers, test_part.numbers])
    assert numbers.sort().values.equal(torch.arange(1797))
    image, label = test_part.load(0)
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert image.max() > 200
    assert test_part.name(0) == f"digit {int(test_part.numbers[0])}"
    assert label == int(test_part.labels[0])


def test_digits_are_enlarged_and_not_mirrored():
    recipe = Recipe(data="digits", train_crop_size=32)
    image, _ = Digits.split(0.2)[1].load(3)
    learn, test = (
        make(recipe, False)(image) for make in (train_transform, transforms.test_transform)
    )
    assert type(learn) is torch.Tensor
    assert learn.shape == (3, 32, 32)
    assert torch.equal(learn, test)


def test_synthetic_images_are_the_same_each_time():
    source = Synthetic(10, 3, 16)
    (a, label), (b, _), (c, _) = source.load(4), source.load(4), source.load(5)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert label == 1
    assert not torch.equal(Synthetic(10, 3, 16, first=10).load(4)[0], a)


# ---- transforms and mixing -----------------------------------------------------------------------


def test_sizes():
    assert Sizes.of(Recipe(), photographs=True) == Sizes(224, 256, 224)
    assert Sizes.of(Recipe(train_crop_size=112), photographs=True) == Sizes(112, 128, 112)
    assert Sizes.of(Recipe(val_crop_size=64), photographs=True) == Sizes(224, 73, 64)
    assert Sizes.of(Recipe(), photographs=False) == Sizes(64, 64, 64)


def test_the_test_transform_is_that_of_the_published_weights():
    from PIL import Image

    from inception_ext import GoogLeNet_Weights

    pixels = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = transforms.test_transform(Recipe(), photographs=True)(image)
    torch.testing.assert_close(ours, GoogLeNet_Weights.DEFAULT.transforms()(image))


@pytest.mark.parametrize("policy", ["ra", "ta_wide", "augmix", "imagenet"])
def test_policies(policy):
    recipe = Recipe(train_crop_size=32, auto_augment=policy, random_erase=0.9)
    transform = train_transform(recipe, True)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    from PIL import Image

    with seeded(1):
        first = transform(Image.fromarray(pixels))
    with seeded(1):
        again = transform(Image.fromarray(pixels))
    assert first.shape == (3, 32, 32)
    assert torch.equal(first, again)


def test_mixing():
    assert batch_mixer(Recipe(), 3) is None
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    for recipe in (Recipe(mixup_alpha=1.0), Recipe(cutmix_alpha=1.0)):
        with seeded(3):
            mixed, targets = batch_mixer(recipe, 3)(images, labels)
        assert not torch.equal(mixed, images)
        assert targets.shape == (4, 3)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert (targets.amax(1) < 1).any()


# ---- shards --------------------------------------------------------------------------------------


def make_shards(folder: Path, shards: int = 4, each: int = 3) -> str:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:03}.tar", "w") as tar:
            for i in range(each):
                pixels = io.BytesIO()
                image = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(image).save(pixels, "png")
                for kind, content in (("png", pixels.getvalue()), ("cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{shard}-{i}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / f"s-{{000..{shards - 1:03}}}.tar")


def shard_recipe(pattern: str, **more: object) -> Recipe:
    return Recipe(data=pattern, num_classes=2, batch_size=3, train_crop_size=32, workers=0, **more)  # type: ignore[arg-type]


def test_shards_are_trained_on(tmp_path):
    pytest.importorskip("webdataset")
    pattern = make_shards(tmp_path / "shards")
    folder = tmp_path / "run"
    assert train(pattern, folder, "--num-classes", "2", "--val-data", pattern) == 0
    (epoch,) = epochs(folder)
    assert epoch["train"]["images"] == 12
    assert epoch["test"]["images"] == 12


def test_order_of_shards(tmp_path):
    pytest.importorskip("webdataset")
    loader = batches(shard_recipe(make_shards(tmp_path)))
    assert loader.steps_per_epoch == 4
    whole, again = list(loader.train(0)), list(loader.train(0))
    names = [name for batch in whole for name in batch.names]
    assert len(set(names)) == 12
    assert names != sorted(names)
    assert [batch.names for batch in whole] == [batch.names for batch in again]
    assert torch.equal(whole[2].images, again[2].images)
    rest = list(loader.train(0, done=3))
    assert [batch.names for batch in rest] == [batch.names for batch in whole[3:]]
    assert torch.equal(rest[0].images, whole[3].images)
    assert [b.names for b in loader.train(1)] != [b.names for b in whole]


def test_processes_share_the_shards(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    recipe = shard_recipe(make_shards(tmp_path))
    seen = []
    for rank in range(2):
        world = World("cpu")
        world.rank, world.size = rank, 2
        loader = Batches(open_data(recipe), recipe, world)
        seen.append([name for batch in loader.train(0) for name in batch.names])
    assert not set(seen[0]) & set(seen[1])
    assert len(set(seen[0]) | set(seen[1])) == 12


def test_what_is_wrong_with_shards(tmp_path, capsys):
    pytest.importorskip("webdataset")
    pattern = make_shards(tmp_path / "shards")
    run = tmp_path / "run"
    assert train(pattern, run) == 1
    assert "give --num-classes" in error_line(capsys)
    assert train(pattern.replace("003", "004"), run, "--num-classes", "2") == 1
    assert "s-004.tar: no such shard" in error_line(capsys)
    assert train(pattern, run, "--num-classes", "2", "--workers", "5") == 1
    assert "4 shards for 5 readers" in error_line(capsys)
    (tmp_path / "no.tar").write_text("nothing")
    assert train(tmp_path / "no.tar", run, "--num-classes", "2") == 1
    assert "no.tar: not a readable tar file" in error_line(capsys)
    assert train("https://example.org/s-{0..3}.tar", run, "--num-classes", "2") == 1
    assert "give --samples-per-epoch" in error_line(capsys)


def test_samples_that_are_wrong_are_named(tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (
            ("a.png", b"no image"), ("a.cls", b"0"), ("b.png", b""), ("c.cls", b"1"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    loader = batches(shard_recipe(str(tmp_path / "s.tar"), val_data=str(tmp_path / "s.tar")))
    (batch,) = loader.test()
    reasons = {os.path.basename(name): reason for name, reason in batch.skipped}
    assert reasons.keys() == {"s.tar:a", "s.tar:b", "s.tar:c"}
    assert reasons["s.tar:c"] == "no image in it"
    assert "'cls'" in reasons["s.tar:b"]


def test_labels_out_of_range(tmp_path):
    pytest.importorskip("webdataset")
    pattern = make_shards(tmp_path, shards=1)
    recipe = shard_recipe(pattern, val_data=pattern)
    loader = Batches(open_data(recipe), recipe, World("cpu"))
    loader.data.classes.pop()
    (batch,) = loader.test()
    assert len(batch) == 2
    assert batch.skipped[0].reason == "label 1, but --num-classes is 1"


def test_webdataset_is_optional(tmp_path, monkeypatch):
    import sys

    (tmp_path / "s.tar").write_text("")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(CommandError, match=r"webdataset missing.*inception_ext\[webdataset\]"):
        open_data(shard_recipe(str(tmp_path / "s.tar")))
