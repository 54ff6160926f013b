"""Randomness that depends on nothing but numbers: neither on workers nor on what ran before."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["generator", "seed_of", "seeded"]


def seed_of(*numbers: int) -> int:
    """One seed for all the numbers together."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded with all the numbers together."""
    return torch.Generator().manual_seed(seed_of(*numbers))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds torch's own generator on the CPU for a block, and puts it back.

    Not ``torch.manual_seed``, which would seed those of the GPUs too.
    """
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed_of(*numbers))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
