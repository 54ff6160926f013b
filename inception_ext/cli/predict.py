"""Classify image files: top classes of each, on the frozen network.

IMAGES are files, or folders, which are searched for images. Files that cannot be read are reported
and skipped; then the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inception_ext._console import CommandError, Progress, require, say
from inception_ext.cli._arguments import fraction, positive

__all__ = ["add_arguments", "find_images", "run"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="a checkpoint of train, a state_dict, or DEFAULT: the published weights",
    )
    parser.add_argument("--averaged", action="store_true", help="the averaged weights in FILE")
    parser.add_argument("-k", "--topk", type=positive, default=5, help="classes (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("-b", "--batch-size", type=positive, default=32, help="default: 32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--early-exit",
        type=fraction,
        metavar="P",
        help="let images go at the first head that is so confident",
    )
    parser.add_argument("--threads", type=positive, help="of PyTorch")


def run(args: argparse.Namespace) -> int:
    require("predict", PIL="pillow")
    from inception_ext.engine import freeze
    from inception_ext.trained import load_trained
    from inception_ext.weights import ImageClassification

    if args.threads:
        torch.set_num_threads(args.threads)
    paths = find_images(args.images)
    try:
        trained = load_trained(args.weights, args.averaged)
        dtype = getattr(torch, args.dtype) if args.dtype else None
        options = {} if args.early_exit is None else {"early_exit": args.early_exit}
        engine = freeze(trained.model.to(args.device), dtype, **options)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise CommandError(str(error).splitlines()[0]) from error
    prepare = ImageClassification(crop_size=trained.crop, resize_size=trained.resize)

    failed = 0
    with Progress(len(paths), "images", stream=sys.stderr) as progress:
        for names, pixels, errors in _batches(paths, prepare, args.batch_size):
            for name, reason in errors:
                progress.line(f"inception_ext predict: skipped {name}: {reason}")
            failed += len(errors)
            if names:
                probabilities = engine(pixels.to(args.device)).float().softmax(1)
                top = probabilities.topk(min(args.topk, probabilities.shape[1]))
                for row in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
                    _print(*row, trained.classes, args.json)
            for _ in range(len(names) + len(errors)):
                progress.step("")
    if args.early_exit is not None and not args.json:
        say(str(engine.saved))  # type: ignore[attr-defined]
    return 1 if failed else 0


def find_images(given: Sequence[Path]) -> list[Path]:
    """The files, and those below the folders that are named as images are, in order.

    Raises:
        CommandError: a name that is neither, or no image at all.
    """
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS)
            if not inside:
                raise CommandError(f"{path}: no images in this folder")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise CommandError(f"{path}: no such file or folder")
    return found


def _batches(
    paths: Sequence[Path], prepare: Any, size: int
) -> Iterator[tuple[list[Path], Tensor, list[tuple[Path, str]]]]:
    """Names, uint8 images ``[N, 3, H, W]``, and what could not be read, batch by batch."""
    from PIL import Image

    for start in range(0, len(paths), size):
        names, images, errors = [], [], []
        for path in paths[start : start + size]:
            try:
                with Image.open(path) as image:
                    images.append(prepare.crop(image.convert("RGB")))
                names.append(path)
            except Exception as error:  # whatever a decoder raises
                reason = str(error) or type(error).__name__
                errors.append((path, reason.splitlines()[0]))
        yield names, torch.stack(images) if images else torch.empty(0), errors


def _print(
    path: Path,
    values: Sequence[float],
    indices: Sequence[int],
    classes: Sequence[str],
    as_json: bool,
) -> None:
    if as_json:
        top = [
            {"class": classes[i], "index": i, "probability": round(p, 6)}
            for p, i in zip(values, indices, strict=True)
        ]
        say(json.dumps({"file": str(path), "top": top}))
    else:
        parts = (f"{classes[i]} {p:.1%}" for p, i in zip(values, indices, strict=True))
        say(f"{path}: {', '.join(parts)}")
