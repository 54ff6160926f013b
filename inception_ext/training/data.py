"""What ``DATA`` may be, as numbered images with labels and names.

A source is anything with ``len()``, ``load(i) -> (image, label)`` and ``name(i)``. Its images are
PIL images in mode RGB or uint8 Tensors ``[3, H, W]``; ``load`` raises where one cannot be read.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from inception_ext._console import CommandError, require
from inception_ext.training.recipe import Recipe
from inception_ext.training.seeds import generator
from inception_ext.training.shards import Shards, is_shards

__all__ = ["EXTENSIONS", "DataSets", "Digits", "Folder", "Source", "Synthetic", "open_data"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

Image = Any  # PIL.Image.Image or Tensor


class Source(Protocol):
    def __len__(self) -> int: ...
    def load(self, i: int) -> tuple[Image, int]: ...
    def name(self, i: int) -> str: ...


@dataclass
class DataSets:
    """What a run learns from and what it is tested on.

    ``photographs`` says whether the images are: then they are cropped and mirrored at random.
    """

    train: Source | Shards
    test: Source | Shards | None
    classes: list[str]
    photographs: bool = True
    in_memory: bool = False


def open_data(recipe: Recipe) -> DataSets:
    """Opens ``recipe.data``; with ``num_classes`` there may be classes that it has no image of.

    Raises:
        CommandError: it is missing, empty, or not what it should be.
    """
    data = _open(recipe)
    number = recipe.num_classes or len(data.classes)
    if number < len(data.classes):
        raise CommandError(f"--num-classes {number}, but the data has {len(data.classes)}")
    data.classes += [f"class {i}" for i in range(len(data.classes), number)]
    return data


def _open(recipe: Recipe) -> DataSets:
    if recipe.synthetic:
        classes = recipe.num_classes or 1000
        size = recipe.train_crop_size or 224
        count = recipe.synthetic_size
        return DataSets(
            Synthetic(count, classes, size),
            Synthetic(max(1, int(count * recipe.val_share)), classes, size, first=count),
            [f"class {i}" for i in range(classes)],
            photographs=False,
            in_memory=True,
        )
    if not recipe.data:
        raise CommandError("no data: name a folder, shards, or digits, or give --synthetic")
    if recipe.data == "digits":
        require("train", sklearn="scikit-learn")
        train, test = Digits.split(recipe.val_share)
        classes_10 = [str(i) for i in range(10)]
        return DataSets(train, test, classes_10, photographs=False, in_memory=True)
    if is_shards(recipe.data):
        return _open_shards(recipe)
    return _open_folder(recipe)


@dataclass(frozen=True)
class Digits:
    """Some of the 1,797 handwritten digits in scikit-learn (Alpaydin and Kaynak, 1998).

    images: uint8 ``[N, 8, 8]``; labels: ``[N]``; numbers: of each in the whole set, ``[N]``.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor

    @classmethod
    def split(cls, test_share: float) -> "tuple[Digits, Digits]":
        """A stratified split, the same each time."""
        from sklearn import datasets
        from sklearn.model_selection import train_test_split

        digits = datasets.load_digits()
        scans = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)  # ink 0 to 16
        labels = torch.from_numpy(digits.target).long()
        parts = train_test_split(
            range(len(labels)), test_size=test_share, stratify=digits.target, random_state=0
        )
        train, test = (torch.tensor(part) for part in parts)
        return cls(scans[train], labels[train], train), cls(scans[test], labels[test], test)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int) -> tuple[Image, int]:
        return self.images[i].expand(3, -1, -1), int(self.labels[i])

    def name(self, i: int) -> str:
        return f"digit {int(self.numbers[i])}"


@dataclass(frozen=True)
class Synthetic:
    """Random images: image i is the same each time, its label is ``i % num_classes``."""

    count: int
    num_classes: int
    size: int
    first: int = 0

    def __len__(self) -> int:
        return self.count

    def load(self, i: int) -> tuple[Image, int]:
        shape = (3, self.size, self.size)
        random = generator(self.first + i)
        image = torch.randint(256, shape, dtype=torch.uint8, generator=random)
        return image, (self.first + i) % self.num_classes

    def name(self, i: int) -> str:
        return f"synthetic {self.first + i}"


@dataclass(frozen=True)
class Folder:
    """Image files: one folder a class, as torchvision's ``ImageFolder`` has them."""

    root: str
    files: Sequence[tuple[str, int]]  # path below root, label

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int) -> tuple[Image, int]:
        from PIL import Image as pillow

        path, label = self.files[i]
        with pillow.open(os.path.join(self.root, path)) as image:
            return image.convert("RGB"), label

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.files[i][0])


def _open_folder(recipe: Recipe) -> DataSets:
    assert recipe.data is not None
    require("train", PIL="pillow")
    root = Path(recipe.data)
    if not root.exists():
        raise CommandError(f"{root}: no such folder (DATA is a folder, shards, or digits)")
    if not root.is_dir():
        raise CommandError(f"{root}: a file, but DATA is a folder, shards, or digits")
    train_root = root / "train" if (root / "train").is_dir() else root
    val_names = [name for name in ("val", "test") if (root / name).is_dir()]
    val_root = Path(recipe.val_data) if recipe.val_data else None
    if val_root is None and train_root != root and val_names:
        val_root = root / val_names[0]

    classes = _classes(train_root)
    train = _files(train_root, classes)
    if val_root is not None:
        if not val_root.is_dir():
            raise CommandError(f"{val_root}: no such folder")
        unknown = sorted(set(_classes(val_root)) - set(classes))
        if unknown:
            raise CommandError(f"{val_root}: class {unknown[0]} is not among those of {train_root}")
        test = _files(val_root, classes)
    else:
        train, test = _split(train, recipe.val_share)
        val_root = train_root
    return DataSets(
        Folder(str(train_root), train), Folder(str(val_root), test) if test else None, classes
    )


def _classes(root: Path) -> list[str]:
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    classes = [name for name in classes if not name.startswith(".")]
    if not classes:
        raise CommandError(f"{root}: no folders in it; it should hold one a class")
    return classes


def _files(root: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    found = []
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [
                (os.path.relpath(os.path.join(folder, file), root), label)
                for file in sorted(files)
                if file.lower().endswith(EXTENSIONS)
            ]
    if not found:
        raise CommandError(f"{root}: no images in its {len(classes)} folders")
    return found


def _split(
    files: list[tuple[str, int]], test_share: float
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """A stratified split, the same each time; a class of one image is learned from."""
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    by_label: dict[int, list[tuple[str, int]]] = {}
    for file in files:
        by_label.setdefault(file[1], []).append(file)
    for label, members in by_label.items():
        order = torch.randperm(len(members), generator=generator(label)).tolist()
        held_out = set(order[: min(round(test_share * len(members)), len(members) - 1)])
        for i, member in enumerate(members):
            (test if i in held_out else train).append(member)
    return train, test


def _open_shards(recipe: Recipe) -> DataSets:
    assert recipe.data is not None
    require("webdataset", webdataset="webdataset", PIL="pillow")
    if recipe.num_classes is None:
        raise CommandError("shards do not say how many classes there are: give --num-classes")
    train = Shards.open(recipe.data, recipe.samples_per_epoch)
    test = Shards.open(recipe.val_data, None) if recipe.val_data else None
    return DataSets(train, test, [f"class {i}" for i in range(recipe.num_classes)])
