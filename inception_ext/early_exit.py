"""Inference that stops where it is sure: the auxiliary classifiers as early exits.

Teerapittayanon et al., "BranchyNet" (2016): an image whose class a side branch is confident of
leaves there. GoogLeNet has two such branches already, on 4a and 4d.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inception_ext._blocks import measure_exits
from inception_ext._frozen import BODY, STEM, Frozen, ModuleCall
from inception_ext._frozen_cuda import FusedNetwork
from inception_ext._images import Images
from inception_ext.engine import Engine

__all__ = ["EarlyExitEngine", "Saved"]

_AFTER_4A, _AFTER_4D = (BODY.index(f"inception4{letter}") + 1 for letter in "ad")
_PARTS = ((*STEM, *BODY[:_AFTER_4A]), BODY[_AFTER_4A:_AFTER_4D], BODY[_AFTER_4D:])


@dataclass
class Saved:
    """What an engine has done since it was made, or since :meth:`reset`.

    Attributes:
        left: images that left at each classifier.
        flops: done for all of them, those of the auxiliary classifiers included.
        plain_flops: of the network without auxiliary classifiers, for the same images.
    """

    left: dict[str, int] = field(default_factory=lambda: {"aux1": 0, "aux2": 0, "main": 0})
    flops: float = 0.0
    plain_flops: float = 0.0

    @property
    def images(self) -> int:
        return sum(self.left.values())

    @property
    def share(self) -> float:
        """Of the work, that was saved; negative where the classifiers cost more than they saved."""
        return 1 - self.flops / self.plain_flops if self.plain_flops else 0.0

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def __str__(self) -> str:
        left = ", ".join(f"{count} at {head}" for head, count in self.left.items())
        return f"{self.images} images left: {left}; {self.share:.1%} of the work saved"


class EarlyExitEngine(Engine):
    """What ``freeze(model, early_exit=...)`` returns.

    Args:
        model, dtype, mean, std: as in :func:`inception_ext.freeze`.
        threshold: the probability of the likeliest class from which on a classifier decides.

    Attributes:
        saved: a :class:`Saved`.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        mean: Sequence[float],
        std: Sequence[float],
        threshold: float,
    ) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise TypeError(f"freeze: early_exit: expected a number, got {threshold!r}")
        if not 0 < threshold <= 1:
            raise ValueError(f"freeze: early_exit: expected above 0, at most 1, got {threshold}")
        self.threshold = float(threshold)
        self.saved = Saved()
        super().__init__(model, dtype, mean, std)

    def refresh(self) -> None:
        for name in ("aux1", "aux2"):
            if not isinstance(getattr(self.model, name, None), nn.Module):
                raise ValueError(f"freeze: early_exit: the model has no {name}")
        self._costs: dict[tuple[int, int], Any] = {}
        super().refresh()

    def _make_network(self, kind: type[Frozen] | type[FusedNetwork]) -> "_Stages":
        dtypes = (self.dtype, self._model_dtype)
        last = len(_PARTS) - 1
        parts = [
            kind(self.model, *dtypes, names=names, head=i == last) for i, names in enumerate(_PARTS)
        ]
        heads = [ModuleCall(getattr(self.model, name), dtypes) for name in ("aux1", "aux2")]
        return _Stages(parts, heads, self.threshold, self._count)

    def _count(self, left: Sequence[int], height: int, width: int) -> None:
        size = (height, width)
        if size not in self._costs:
            self._costs[size] = measure_exits(self.model, size)
        cost = self._costs[size]
        for head, images in zip(self.saved.left, left, strict=True):
            self.saved.left[head] += images
            self.saved.flops += images * getattr(cost, head)
            self.saved.plain_flops += images * cost.plain

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, early exit at {self.threshold:g})"


class _Stages:
    """The network in three parts, with an exit behind each.

    Args:
        parts: images to 4a, to 4d, to the logits.
        heads: aux1 and aux2.
        threshold: see :class:`EarlyExitEngine`.
        count: called with the images that left at each exit, and their height and width.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        heads: Sequence[ModuleCall],
        threshold: float,
        count: Callable[[Sequence[int], int, int], None],
    ) -> None:
        self.parts, self.heads, self.threshold, self.count = parts, heads, threshold, count
        self.reads_images = parts[0].reads_images

    def __call__(self, images: Images | Tensor) -> Tensor:
        pixels = images.pixels if isinstance(images, Images) else images
        x = self.parts[0](images)
        logits = self.heads[0](x)  # [N, num_classes]; rows of images that go on are replaced
        going = torch.arange(x.shape[0], device=x.device)
        here, left = logits, []
        for part, head in zip(self.parts[1:], [self.heads[1], None], strict=True):
            # NaN is not sure of anything.
            stays = ~(here.float().softmax(1).amax(1) >= self.threshold)
            before = going.numel()
            going, x = going[stays], x[stays].contiguous(memory_format=torch.channels_last)
            left.append(before - going.numel())
            if not going.numel():
                break
            x = part(x)
            here = x if head is None else head(x)
            logits[going] = here
        left += [0] * (2 - len(left))
        self.count([*left, int(going.numel())], *pixels.shape[2:])
        return logits

    def count_fused(self) -> tuple[int, int]:
        """How many of the modules before the heads are fused, and of how many."""
        counts = [part.count_fused() for part in self.parts]
        return sum(fused for fused, _ in counts), sum(total for _, total in counts)
