"""One image on its way into a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from inception_ext.training.seeds import seeded

__all__ = ["Sample", "Samples", "Unreadable"]


class Sample(NamedTuple):
    """image: float32 ``[3, H, W]``, normalised."""

    image: Tensor
    label: int
    name: str


class Unreadable(NamedTuple):
    """An image that is skipped, and why."""

    name: str
    reason: str


class Samples(Dataset):
    """The samples of a source.

    What is random in the transform of image i depends on ``seed`` (of the run, and the epoch) and
    on i alone.
    """

    def __init__(
        self, source: Any, transform: Callable[[Any], Tensor], seed: tuple[int, int]
    ) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Sample | Unreadable:
        try:
            image, label = self.source.load(i)
            with seeded(*self.seed, i):
                return Sample(self.transform(image), label, self.source.name(i))
        except Exception as error:  # whatever a decoder raises
            reason = str(error) or type(error).__name__
            return Unreadable(self.source.name(i), reason.splitlines()[0])
