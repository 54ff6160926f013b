"""Batches: which images in which order, without those that cannot be read."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from inception_ext._console import CommandError
from inception_ext.training.data import DataSets
from inception_ext.training.distributed import World
from inception_ext.training.recipe import Recipe
from inception_ext.training.samples import Sample, Samples, Unreadable
from inception_ext.training.shards import ShardReader, Shards
from inception_ext.training.transforms import Transform, test_transform, train_transform

__all__ = ["Batch", "Batches"]


@dataclass
class Batch:
    """images: ``[N, 3, H, W]``; labels: int64 ``[N]``; names: of the N; skipped: the others."""

    images: Tensor
    labels: Tensor
    names: list[str]
    skipped: list[Unreadable] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def pin_memory(self) -> "Batch":
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def collate(samples: Sequence[Sample | Unreadable]) -> Batch:
    good = [sample for sample in samples if isinstance(sample, Sample)]
    images = [sample.image for sample in good]
    return Batch(
        torch.stack(images) if images else torch.empty(0, 3, 1, 1),
        torch.tensor([sample.label for sample in good], dtype=torch.int64),
        [sample.name for sample in good],
        [sample for sample in samples if isinstance(sample, Unreadable)],
    )


class Batches:
    """The batches of a run, for this process."""

    def __init__(self, data: DataSets, recipe: Recipe, world: World) -> None:
        self.data, self.recipe, self.world = data, recipe, world
        self._train = train_transform(recipe, data.photographs)
        self._test = test_transform(recipe, data.photographs)
        self.workers = self._choose_workers()
        own = -(-len(data.train) // world.size)  # DistributedSampler fills up with repetitions
        self.steps_per_epoch = max(own // recipe.batch_size, 1)
        if isinstance(data.train, Shards):
            self._check_readers(data.train)

    def _choose_workers(self) -> int:
        if self.recipe.workers is not None:
            return self.recipe.workers
        if self.data.in_memory:
            return 0
        workers = min(8, max(1, (os.cpu_count() or 1) // self.world.local_size))
        if isinstance(self.data.train, Shards):
            workers = min(workers, len(self.data.train.urls) // self.world.size)
        return workers

    def _check_readers(self, shards: Shards) -> None:
        readers = self.world.size * max(self.workers, 1)
        if len(shards.urls) < readers:
            raise CommandError(
                f"{len(shards.urls)} shards for {readers} readers ({self.world.size} processes of "
                f"{max(self.workers, 1)} workers): use fewer --workers, or more shards"
            )

    def train(self, epoch: int, done: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the one after ``done`` on.

        Full ones only, where the data fills one: ``steps_per_epoch`` in all.
        """
        seed = (self.recipe.seed, epoch)
        size, rank = self.world.size, self.world.rank
        batch = self.recipe.batch_size
        if isinstance(self.data.train, Shards):
            reader = self._reader(self.data.train, self._train, seed)
            loader = self._loader(reader, batch_size=batch)
            yield from islice(loader, done, self.steps_per_epoch)
            return
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train,  # type: ignore[arg-type]  # its length is all that is asked
            num_replicas=size,
            rank=rank,
            seed=self.recipe.seed,
        )
        sampler.set_epoch(epoch)
        order = list(sampler)
        chosen = [order[i * batch : (i + 1) * batch] for i in range(done, self.steps_per_epoch)]
        samples = Samples(self.data.train, self._train, seed)
        yield from self._loader(samples, batch_sampler=chosen)

    def test(self) -> Iterator[Batch]:
        """The images to test on, each in one process and once."""
        data = self.data.test
        if data is None:
            return
        size, rank = self.world.size, self.world.rank
        batch = self.recipe.batch_size
        if isinstance(data, Shards):
            yield from self._loader(self._reader(data, self._test, None), batch_size=batch)
            return
        own = list(range(rank, len(data), size))
        chosen = [own[i : i + batch] for i in range(0, len(own), batch)]
        yield from self._loader(Samples(data, self._test, (0, 0)), batch_sampler=chosen)

    def _reader(
        self, shards: Shards, transform: Transform, seed: tuple[int, int] | None
    ) -> ShardReader:
        classes = len(self.data.classes)
        return ShardReader(shards, transform, seed, classes, self.world.rank, self.world.size)

    def _loader(self, dataset: Any, **order: Any) -> Iterable[Batch]:
        return DataLoader(
            dataset,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=self.world.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_parent,
            # Its own, or it would draw from the generator that dropout draws from.
            generator=torch.Generator(),
            **order,
        )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A signal to the whole group must not end the workers: the step has to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
