"""Notices when a model's weights, statistics or submodules change."""

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["Watch"]

# Attributes of layers that the fused steps read.
_SETTINGS = (
    *("eps", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("ceil_mode", "return_indices", "output_size", "size", "alpha", "beta", "k"),
)

_version = attrgetter("_version")


class Watch:
    """Notices when anything that the weights were read from changes.

    Every call of an engine looks, so all loops are the interpreter's own: some 1500 things in the
    time of a few launches. Nor does anything run in between that could change a table.
    """

    def __init__(self, model: nn.Module) -> None:
        tables: list[dict[Any, Any]] = []
        self._sized: list[dict[Any, Any]] = []
        self._settings: list[tuple[itemgetter[Any], dict[Any, Any]]] = []
        for module in model.modules():
            attributes = module.__dict__
            tables += (module._parameters, module._buffers, module._modules)
            # By their number: hooks, and a forward() patched onto the object.
            self._sized += (module._forward_hooks, module._forward_pre_hooks, attributes)
            names = [name for name in _SETTINGS if name in attributes]
            if names:
                self._settings.append((itemgetter(*names), attributes))
        # What comes into an empty table is read by nobody: forward() would have to change as well.
        self._tables = [table for table in tables if table]
        self._values = list(chain.from_iterable(map(dict.values, self._tables)))
        # The counts of batches too: torch does not count what training does to running statistics.
        self._tensors = [*model.parameters(), *model.buffers()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        # Kept, so that no new tensor gets the address of an old one.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        return (
            list(map(_version, self._counted)),
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(len, self._sized)),
            [read(attributes) for read, attributes in self._settings],
            bool(_has_any_global_hook()),
        )

    def changed(self) -> bool:
        if sum(map(len, self._tables)) != len(self._values):
            return True
        values = chain.from_iterable(map(dict.values, self._tables))
        if not all(map(is_, values, self._values)):
            return True
        try:
            return self._read() != self._state
        except KeyError:  # a setting is gone
            return True
