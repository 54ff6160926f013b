"""The 1,797 handwritten digits that come with scikit-learn, as images for GoogLeNet."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Digits", "load_digits"]


@dataclass(frozen=True)
class Digits:
    """A stratified split. Images are float32 in [-1, 1], ``[N, 3, size, size]``, channels_last;
    labels are int64 ``[N]``, 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(*, size: int, seed: int, test_share: float = 0.2) -> Digits:
    """8 x 8 scans (Alpaydin and Kaynak, 1998), enlarged bilinearly to ``size`` x ``size``."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    scans = torch.from_numpy(digits.images).float() / 8 - 1  # [1797, 8, 8], ink from 0 to 16
    images = F.interpolate(scans[:, None], size=(size, size), mode="bilinear")
    images = images.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(
        range(len(labels)), test_size=test_share, stratify=digits.target, random_state=seed
    )
    return Digits(images[train], labels[train], images[test], labels[test])
