"""WebDataset shards: tar files of images (``.jpg``, ``.png``, ...) and labels (``.cls``)."""

import glob
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from inception_ext._console import CommandError
from inception_ext.training.samples import Sample, Unreadable
from inception_ext.training.seeds import generator, seed_of, seeded

__all__ = ["ShardReader", "Shards", "is_shards"]

IMAGES = ("jpg", "jpeg", "png", "ppm", "webp")
BUFFER = 1000  # samples among which the next one is drawn


def is_shards(data: str) -> bool:
    """Whether ``DATA`` names shards: a .tar, a brace pattern of them, or a folder of them."""
    return data.endswith(".tar") or bool(glob.glob(os.path.join(data, "*.tar")))


@dataclass(frozen=True)
class Shards:
    """urls: of the tar files; count: samples of an epoch."""

    urls: list[str]
    count: int

    @classmethod
    def open(cls, data: str, count: int | None) -> "Shards":
        """Expands ``shards-{000..099}.tar`` and counts the samples where nobody says how many.

        Raises:
            CommandError: a shard is missing or no tar file, or there is nothing to count.
        """
        import webdataset

        in_folder = sorted(glob.glob(os.path.join(data, "*.tar")))
        urls = in_folder or webdataset.shardlists.expand_urls(data)
        local = [url for url in urls if "://" not in url and not url.startswith("pipe:")]
        for url in local:
            if not os.path.isfile(url):
                raise CommandError(f"{url}: no such shard")
        if count is None:
            if len(local) < len(urls):
                raise CommandError(f"{data}: give --samples-per-epoch for shards elsewhere")
            count = sum(map(_count, local))
        if not count:
            raise CommandError(f"{data}: no images in {len(urls)} shards")
        return cls(urls, count)

    def __len__(self) -> int:
        return self.count


def _count(path: str) -> int:
    try:
        with tarfile.open(path) as tar:
            return sum(name.rpartition(".")[2].lower() in IMAGES for name in tar.getnames())
    except (tarfile.TarError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise CommandError(f"{path}: not a readable tar file ({reason})") from error


class ShardReader(IterableDataset):
    """Samples of this process and this worker.

    While training the shards and the samples within them come in a seeded order, over and over;
    otherwise each comes once, in the order of the files.

    Args:
        shards: all of them.
        transform: from a PIL image to a Tensor ``[3, H, W]``.
        seed: of the run and of the epoch; None: in order.
        num_classes: labels beyond are refused.
        rank, size: of this process among all.
    """

    def __init__(
        self,
        shards: Shards,
        transform: Callable[[Any], torch.Tensor],
        seed: tuple[int, int] | None,
        num_classes: int,
        rank: int,
        size: int,
    ) -> None:
        self.shards = shards
        self.transform = transform
        self.seed = seed
        self.num_classes = num_classes
        self.rank, self.size = rank, size

    def __iter__(self) -> Iterator[Sample | Unreadable]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, readers = self.rank * workers + number, self.size * workers
        urls = self.shards.urls
        if self.seed is None:
            yield from self._read(urls[reader::readers], round=0)
            return
        order = torch.randperm(len(urls), generator=generator(*self.seed)).tolist()
        own = [urls[i] for i in order[reader::readers]]
        round = 0
        while own:
            yield from self._read(own, round)
            round += 1

    def _read(self, urls: list[str], round: int) -> Iterator[Sample | Unreadable]:
        import webdataset

        broken: list[str] = []

        def note(error: Exception) -> bool:
            broken.append(str(error) or type(error).__name__)
            return True

        for url in urls:
            broken.clear()
            raw = webdataset.tariterators.tarfile_samples([{"url": url}], handler=note)
            if self.seed is not None:
                number = zlib.crc32(url.encode())
                raw = webdataset.filters.detshuffle(
                    bufsize=BUFFER, initial=BUFFER, seed=seed_of(*self.seed, round, number)
                ).run(raw)
            for entry in raw:
                yield self._sample(url, entry, round)
            for reason in broken:
                yield Unreadable(url, reason)

    def _sample(self, url: str, entry: dict[str, Any], round: int) -> Sample | Unreadable:
        from PIL import Image

        name = f"{url}:{entry['__key__']}"
        try:
            data = next(entry[kind] for kind in IMAGES if kind in entry)
            label = int(entry["cls"])
            if not 0 <= label < self.num_classes:
                return Unreadable(name, f"label {label}, but --num-classes is {self.num_classes}")
            with (
                Image.open(io.BytesIO(data)) as image,
                seeded(*(self.seed or (0, 0)), round, zlib.crc32(name.encode())),
            ):
                return Sample(self.transform(image.convert("RGB")), label, name)
        except StopIteration:
            return Unreadable(name, "no image in it")
        except KeyError as error:
            return Unreadable(name, f"no {error} in it")
        except Exception as error:  # whatever a decoder raises
            return Unreadable(name, str(error) or type(error).__name__)
