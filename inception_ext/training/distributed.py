"""The processes that train together, as torchrun starts them; alone without torchrun."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["World"]


class World:
    """This process among those of a run.

    Args:
        device: ``"auto"`` (CUDA where there is some), ``"cpu"``, ``"cuda"``, or ``"cuda:1"``.

    Raises:
        ValueError: a device that torch does not have.
    """

    def __init__(self, device: str = "auto") -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = self._device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.is_distributed:
            # Decisions and metrics travel as CPU tensors: no stream waits for them.
            both = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(both)

    def _device(self, name: str) -> torch.device:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name}: not a device that torch knows") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {name}: expected cpu or cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch finds no CUDA device here")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", self.local_rank)
        return device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values, added up over all processes in float64; NaN in one is NaN in all."""
        if not self.is_distributed:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: Any) -> list[Any]:
        """One item of each process, by rank."""
        if not self.is_distributed:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
