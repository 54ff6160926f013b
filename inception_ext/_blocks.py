"""Shape, parameters and work of each block of a GoogLeNet."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from inception_ext._frozen import BODY, STEM

__all__ = ["Block", "Exits", "block_names", "measure_blocks", "measure_exits"]

AUXILIARY = {"inception4a": "aux1", "inception4d": "aux2"}  # which block each head reads


@dataclass(frozen=True)
class Block:
    """name: of the child; shape: of its output for one image; flops: two a multiply-accumulate."""

    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def block_names(model: nn.Module) -> list[str]:
    """The children up to the last feature map, in the order of their calls."""
    return [name for name in (*STEM, *BODY) if hasattr(model, name)]


def measure_blocks(model: Any, size: int | tuple[int, int]) -> dict[str, Block]:
    """Every block, the heads among them, by name, for one image of a size (or height and width).

    Nothing is computed: shapes alone run through the network.
    """
    twin = copy.deepcopy(model).to("meta").eval()
    blocks: dict[str, Block] = {}

    def run(name: str, x: Tensor) -> Tensor:
        module = getattr(twin, name)
        with FlopCounterMode(display=False) as counter:
            y = module(x)
        parameters = sum(p.numel() for p in module.parameters())
        blocks[name] = Block(name, tuple(y.shape[1:]), parameters, counter.get_total_flops())
        return y

    with torch.no_grad():
        dtype = next(twin.parameters()).dtype
        height, width = (size, size) if isinstance(size, int) else size
        x = torch.empty(1, 3, height, width, device="meta", dtype=dtype)
        for name in block_names(twin):
            x = run(name, x)
            head = AUXILIARY.get(name)
            if head and getattr(twin, head) is not None:
                run(head, x)
        x = run("avgpool", x)
        run("fc", torch.flatten(x, 1))
    return blocks


@dataclass(frozen=True)
class Exits:
    """FLOPs of an image that leaves at aux1, at aux2, or at the main classifier, having asked all
    the heads on its way; and those of the network without auxiliary heads."""

    aux1: int
    aux2: int
    main: int
    plain: int


def measure_exits(model: Any, size: int | tuple[int, int]) -> Exits:
    """What an early exit costs, for images of a size (or height and width)."""
    blocks = measure_blocks(model, size)
    names = list(blocks)
    flops = {name: block.flops for name, block in blocks.items()}

    def up_to(name: str) -> int:
        return sum(flops[n] for n in names[: names.index(name) + 1])

    everything = sum(flops.values())
    return Exits(
        up_to("aux1"), up_to("aux2"), everything, everything - flops["aux1"] - flops["aux2"]
    )
