"""Real photographs out of scikit-image's wheel, and a network that has something to say on them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from inception_ext.functional import use_kernels
from inception_ext.googlenet import GoogLeNet, googlenet
from inception_ext.weights import GoogLeNet_Weights

__all__ = ["PHOTOGRAPHS", "load_batch", "network"]

# Those that lie in the wheel; the other images of skimage.data are downloads.
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "stereo_motorcycle",
    "retina",
    "immunohistochemistry",
    "hubble_deep_field",
)


def _photograph(name: str) -> Tensor:
    """uint8 ``[3, H, W]``."""
    from skimage import data

    image = getattr(data, name)()
    if isinstance(image, tuple):  # a stereo pair and its disparity
        image = image[0]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def load_batch(count: int) -> tuple[list[str], Tensor]:
    """Names, and the photographs as the published weights want them: ``[count, 3, 224, 224]``."""
    prepare = GoogLeNet_Weights.DEFAULT.transforms()
    names = list(PHOTOGRAPHS[:count])
    batch = torch.stack([prepare(_photograph(name)) for name in names])
    return names, batch.contiguous(memory_format=torch.channels_last)


def network(seed: int) -> tuple[GoogLeNet, str]:
    """A GoogLeNet in eval mode and where its weights come from.

    The published weights where torch.hub has them already; nothing is downloaded. Otherwise
    seeded weights, with the statistics of BatchNorm fitted to the photographs: as initialised,
    hardly anything would reach the classifier.
    """
    weights = GoogLeNet_Weights.DEFAULT
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    if os.path.isfile(cached):
        return googlenet(weights=weights).eval(), "the published ImageNet weights"
    torch.manual_seed(seed)
    model = googlenet(aux_logits=False, transform_input=True, init_weights=True)
    _fit_statistics(model)
    return model.eval(), (
        f"seed {seed}, BatchNorm fitted to the photographs (the published weights are not in the "
        "cache of torch.hub): classes mean nothing here, agreement does"
    )


def _fit_statistics(model: GoogLeNet) -> None:
    """Sets all running statistics to those of five crops of each photograph."""
    prepare = GoogLeNet_Weights.DEFAULT.transforms(crop_size=256)
    squares = torch.stack([prepare(_photograph(name)) for name in PHOTOGRAPHS])
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    crops = [squares[:, :, top : top + 224, left : left + 224] for top, left in corners]
    with _averaging(model), torch.no_grad(), use_kernels(False):
        for crop in crops:
            model(crop)


@contextmanager
def _averaging(model: nn.Module) -> Iterator[None]:
    """Within, BatchNorm's running statistics are the plain average over all batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    training = model.training
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    try:
        yield
    finally:
        model.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
