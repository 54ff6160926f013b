"""Notices when a model's weights, statistics or submodules change."""

import operator
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["Watch"]

# Attributes of layers that the fused steps read.
_SETTINGS = (
    *("eps", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    *("ceil_mode", "return_indices", "output_size", "size", "alpha", "beta", "k"),
)


class Watch:
    """Notices when anything that the weights were read from changes."""

    def __init__(self, model: nn.Module) -> None:
        entries: list[tuple[dict[Any, Any], str, Any]] = []
        self._sized: list[dict[Any, Any]] = []
        for module in model.modules():
            tables: list[dict[Any, Any]] = [module._parameters, module._buffers, module._modules]
            for table in tables:
                entries.extend((table, name, value) for name, value in table.items())
            attributes = module.__dict__
            entries.extend((attributes, k, attributes[k]) for k in _SETTINGS if k in attributes)
            # By their number: new children, hooks, and a forward() patched onto the object.
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            self._sized.extend((*tables, *hooks, attributes))
        self._tables, self._names, self._values = zip(*entries, strict=True)
        # The counts of batches too: torch does not count what training does to running statistics.
        self._tensors = [*model.parameters(), *model.buffers()]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        # Kept, so that no new tensor gets the address of an old one.
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._state = self._read()

    def _read(self) -> tuple[Any, ...]:
        return (
            [tensor._version for tensor in self._counted],
            [tensor.data_ptr() for tensor in self._tensors],
            [len(table) for table in self._sized],
            bool(_has_any_global_hook()),
        )

    def changed(self) -> bool:
        values = map(dict.get, self._tables, self._names)
        return self._read() != self._state or not all(map(operator.is_, values, self._values))
