"""The training loss of a network with auxiliary classifiers."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["GoogLeNetLoss"]


class GoogLeNetLoss(nn.Module):
    """``main + aux_weight * (aux1 + aux2)``, the same target for all three heads.

    The weight of 0.3 is that of the paper (Szegedy et al., "Going Deeper with Convolutions",
    2014, section 5).

    Args:
        aux_weight: weight of the auxiliary losses, a finite number, not negative.
        criterion: ``criterion(logits, target) -> Tensor``, a module or any other callable;
            default ``nn.CrossEntropyLoss()``.

    Raises:
        TypeError: ``aux_weight`` is not a number, or ``criterion`` is not callable or is a class.
        ValueError: ``aux_weight`` is negative or not finite.

    Example:
        >>> loss = GoogLeNetLoss()
        >>> loss(model(images), labels).backward()
    """

    def __init__(
        self, aux_weight: float = 0.3, criterion: Callable[[Tensor, Any], Tensor] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(aux_weight, int | float) or isinstance(aux_weight, bool):
            raise TypeError(f"aux_weight should be a number instead of {aux_weight!r}")
        if not math.isfinite(aux_weight) or aux_weight < 0:
            raise ValueError(
                f"aux_weight should be finite and not negative instead of {aux_weight}"
            )
        if criterion is not None and (not callable(criterion) or isinstance(criterion, type)):
            raise TypeError(
                "criterion should be a module or a function (logits, target) -> loss "
                f"instead of {criterion!r}"
            )
        self.aux_weight = float(aux_weight)
        self.criterion = nn.CrossEntropyLoss() if criterion is None else criterion

    def forward(self, outputs: Any, target: Any) -> Tensor:
        """Loss of what a GoogLeNet returned, in training or in eval mode.

        Args:
            outputs: logits ``[N, num_classes]``, or a ``GoogLeNetOutputs`` (of this package or of
                torchvision) or another tuple with its three fields. Heads that are None count
                for nothing.
            target: whatever the criterion takes beside logits.

        Raises:
            TypeError: outputs is neither a Tensor nor has the three fields.
        """
        main, *auxiliary = self.parts(outputs, target).values()
        return main + self.aux_weight * sum(auxiliary) if auxiliary else main

    def parts(self, outputs: Any, target: Any) -> dict[str, Tensor]:
        """The unweighted loss of each head: ``main`` first, then ``aux1`` and ``aux2`` if there.

        Arguments and errors are those of the forward pass.
        """
        if isinstance(outputs, Tensor):
            return {"main": self.criterion(outputs, target)}
        try:
            logits = outputs.logits
            heads = {"aux1": outputs.aux_logits1, "aux2": outputs.aux_logits2}
        except AttributeError:
            raise TypeError(
                "outputs should be a Tensor or have the fields of GoogLeNetOutputs (logits, "
                f"aux_logits2, aux_logits1) instead of {type(outputs).__name__}"
            ) from None
        present = {"main": logits, **{k: head for k, head in heads.items() if head is not None}}
        return {name: self.criterion(head, target) for name, head in present.items()}

    def extra_repr(self) -> str:
        return f"aux_weight={self.aux_weight}"
