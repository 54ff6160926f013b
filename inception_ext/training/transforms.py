"""From an image to what the network reads, by torchvision.transforms.v2."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inception_ext._torchvision import import_torchvision
from inception_ext.engine import IMAGENET_MEAN, IMAGENET_STD
from inception_ext.training.recipe import Recipe

__all__ = ["Sizes", "Transform", "batch_mixer", "test_transform", "train_transform"]

Transform = Callable[[Any], Tensor]


def _v2() -> Any:
    import_torchvision()
    from torchvision.transforms import v2

    return v2


@dataclass(frozen=True)
class Sizes:
    """In pixels: of the crops to learn from, and of the resize and the crop to test on."""

    train_crop: int
    val_resize: int
    val_crop: int

    @classmethod
    def of(cls, recipe: Recipe, photographs: bool) -> "Sizes":
        """224, 256, 224 for photographs; for drawings 64 throughout: nothing is cropped."""
        train = recipe.train_crop_size or (224 if photographs or recipe.synthetic else 64)
        crop = recipe.val_crop_size or train
        resize = recipe.val_resize_size or (round(crop * 256 / 224) if photographs else crop)
        return cls(train, resize, crop)


def _normalised(v2: Any) -> list[Any]:
    return [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]


def train_transform(recipe: Recipe, photographs: bool) -> Transform:
    """Photographs: a random crop, mirrored at random; drawings: resized. Both: ``auto_augment``
    (``ra``, ``ta_wide``, ``augmix`` or ``imagenet``) and ``random_erase`` by choice."""
    v2 = _v2()
    size = Sizes.of(recipe, photographs).train_crop
    steps: list[Any] = (
        [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        if photographs
        else [v2.Resize((size, size), antialias=True)]
    )
    policies = {
        "ra": v2.RandAugment,
        "ta_wide": v2.TrivialAugmentWide,
        "augmix": v2.AugMix,
        "imagenet": v2.AutoAugment,
    }
    if recipe.auto_augment is not None:
        steps.append(policies[recipe.auto_augment]())
    steps += _normalised(v2)
    if recipe.random_erase > 0:
        steps.append(v2.RandomErasing(p=recipe.random_erase))
    return v2.Compose([*steps, v2.ToPureTensor()])


def test_transform(recipe: Recipe, photographs: bool) -> Transform:
    """Photographs: resized (shorter side), cropped in the middle; drawings: resized."""
    v2 = _v2()
    sizes = Sizes.of(recipe, photographs)
    steps = (
        [v2.Resize(sizes.val_resize, antialias=True), v2.CenterCrop(sizes.val_crop)]
        if photographs
        else [v2.Resize((sizes.val_crop, sizes.val_crop), antialias=True)]
    )
    return v2.Compose([*steps, *_normalised(v2), v2.ToPureTensor()])


def batch_mixer(recipe: Recipe, num_classes: int) -> Callable[[Tensor, Tensor], Any] | None:
    """Mixup, cutmix, or for each batch one of both; turns labels into ``[N, num_classes]``."""
    v2 = _v2()
    mixers = [
        make(alpha=alpha, num_classes=num_classes)
        for make, alpha in ((v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha))
        if alpha > 0
    ]
    return v2.RandomChoice(mixers) if mixers else None
