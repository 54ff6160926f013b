"""Show why GoogLeNet has three softmaxes: gradients, accuracies and early exits, a picture.

explain gradient-flow [DATA]              who sends gradient where, with and without the heads
explain softmaxes DATA --weights FILE     accuracy, calibration and early exits of all three
explain topology [--weights FILE]         the network as a picture, SVG and PNG
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from inception_ext._console import CommandError, Progress, heading, require, say
from inception_ext._files import make_folder, write_text
from inception_ext.cli._arguments import fraction, non_negative, positive, positive_float

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    topics = parser.add_subparsers(dest="topic", required=True, metavar="TOPIC")

    def topic(name: str, what: str, function: Callable[[argparse.Namespace], int]) -> Any:
        sub = topics.add_parser(name, help=what, description=what)
        sub.set_defaults(explain=function)
        sub.add_argument("--output-dir", type=Path, default=Path("runs/explain"), metavar="DIR")
        sub.add_argument("--threads", type=positive, help="of PyTorch")
        return sub

    flow = topic("gradient-flow", "the gradient that reaches each module", _gradient_flow)
    flow.add_argument("data", nargs="?", default="digits", metavar="DATA", help="default: digits")
    flow.add_argument("--synthetic", action="store_true", help="random images instead of DATA")
    flow.add_argument("--num-classes", type=positive)
    flow.add_argument("--steps", type=positive, default=20, help="default: 20")
    flow.add_argument("--variant", choices=["torchvision", "bvlc"], default="torchvision")
    flow.add_argument("--aux-weight", type=positive_float, default=0.3, help="default: 0.3")
    flow.add_argument("-b", "--batch-size", type=positive, default=32, help="default: 32")
    flow.add_argument("--lr", type=positive_float, default=0.05, help="default: 0.05")
    flow.add_argument("--opt", choices=["sgd", "adamw"], default="sgd", help="default: sgd")
    flow.add_argument("--train-crop-size", type=positive, metavar="PIXELS")
    flow.add_argument("--seed", type=non_negative, default=0)
    flow.add_argument("-j", "--workers", type=non_negative, default=0)

    soft = topic("softmaxes", "accuracy, calibration and early exits of all three", _softmaxes)
    soft.add_argument("data", metavar="DATA", help="as in train; its test images are used")
    soft.add_argument("--weights", required=True, metavar="FILE", help="of a network with heads")
    soft.add_argument("--averaged", action="store_true", help="the averaged weights in FILE")
    soft.add_argument("--val-data", metavar="DATA")
    soft.add_argument("--val-share", type=fraction, default=0.2)
    soft.add_argument("-b", "--batch-size", type=positive, default=64)
    soft.add_argument("-j", "--workers", type=non_negative, default=0)

    picture = topic("topology", "the network as a picture, SVG and PNG", _topology)
    picture.add_argument("--weights", metavar="FILE", help="default: an untrained network")
    picture.add_argument("--variant", choices=["torchvision", "bvlc"], default="torchvision")
    picture.add_argument("--num-classes", type=positive, default=1000)
    picture.add_argument("--size", type=positive, help="of the images (default: 224)")


def run(args: argparse.Namespace) -> int:
    require("train", torchvision="torchvision", matplotlib="matplotlib", tqdm="tqdm")
    if args.threads:
        torch.set_num_threads(args.threads)
    function: Callable[[argparse.Namespace], int] = args.explain
    return function(args)


def _gradient_flow(args: argparse.Namespace) -> int:
    from inception_ext.explain import gradient_flow
    from inception_ext.training.recipe import Recipe

    names = ("data", "synthetic", "num_classes", "variant", "aux_weight", "batch_size")
    more = ("lr", "opt", "train_crop_size", "seed", "workers")
    recipe = Recipe(device="cpu", **{name: getattr(args, name) for name in (*names, *more)})
    try:
        result = gradient_flow.measure(recipe, args.steps)
    except ValueError as error:
        raise CommandError(str(error)) from error
    heading(f"Gradient flow, {recipe.variant} variant, {args.steps} steps, seed {recipe.seed}")
    say(gradient_flow.render(result))
    result["shares"] = {name: gradient_flow.shares(result, name) for name in result["modules"]}
    make_folder(args.output_dir)
    gradient_flow.save_picture(result, args.output_dir / "gradient_flow.png")
    _write_json(result, args.output_dir / "gradient_flow.json")
    say(f"\nwrote {args.output_dir / 'gradient_flow.png'} and .json")
    return 0


def _softmaxes(args: argparse.Namespace) -> int:
    from inception_ext._blocks import measure_exits
    from inception_ext.explain import softmaxes
    from inception_ext.trained import load_trained
    from inception_ext.training.batches import Batches
    from inception_ext.training.data import open_data
    from inception_ext.training.distributed import World
    from inception_ext.training.network import forward_heads
    from inception_ext.training.recipe import Recipe

    try:
        trained = load_trained(args.weights, args.averaged)
    except (FileNotFoundError, RuntimeError) as error:
        raise CommandError(f"--weights: {error}") from error
    model = trained.model
    if model.aux1 is None or model.aux2 is None:
        raise CommandError(f"--weights: {args.weights} holds no auxiliary heads")
    recipe = Recipe(
        data=args.data,
        val_data=args.val_data,
        val_share=args.val_share,
        num_classes=len(trained.classes),
        batch_size=args.batch_size,
        workers=args.workers,
        train_crop_size=trained.crop,
        val_resize_size=trained.resize,
        val_crop_size=trained.crop,
    )
    data = open_data(recipe)
    if data.test is None:
        raise CommandError(f"{args.data}: there is nothing to test on; give --val-data")
    parts: dict[str, list[torch.Tensor]] = {head: [] for head in softmaxes.ORDER}
    labels = []
    total = -(-len(data.test) // args.batch_size)
    with torch.no_grad(), Progress(total, "testing") as progress:
        for batch in Batches(data, recipe, World("cpu")).test():
            for name, reason in batch.skipped:
                progress.line(f"skipped {name}: {reason}")
            if len(batch):
                logits = forward_heads(
                    model, batch.images.contiguous(memory_format=torch.channels_last)
                )
                labels.append(batch.labels)
                for head, values in logits.items():
                    parts[head].append(values)
            progress.step("")
    if not labels:
        raise CommandError(f"{args.data}: no image could be read")
    result = softmaxes.measure(
        {head: torch.cat(values) for head, values in parts.items()},
        torch.cat(labels),
        measure_exits(model, trained.crop),
    )
    heading(f"The three softmaxes of {args.weights}")
    say(softmaxes.render(result))
    make_folder(args.output_dir)
    softmaxes.save_picture(result, args.output_dir / "softmaxes.png")
    _write_json(result, args.output_dir / "softmaxes.json")
    say(f"\nwrote {args.output_dir / 'softmaxes.png'} and .json")
    return 0


def _topology(args: argparse.Namespace) -> int:
    from inception_ext.bvlc import BVLCGoogLeNet
    from inception_ext.explain import topology
    from inception_ext.googlenet import GoogLeNet
    from inception_ext.trained import load_trained

    size = args.size or 224
    if args.weights:
        try:
            trained = load_trained(args.weights)
        except (FileNotFoundError, RuntimeError) as error:
            raise CommandError(f"--weights: {error}") from error
        model, size = trained.model, args.size or trained.crop
    elif args.variant == "bvlc":
        model = BVLCGoogLeNet(args.num_classes, init_weights=False)
    else:
        model = GoogLeNet(args.num_classes, init_weights=False)
    make_folder(args.output_dir)
    paths = [args.output_dir / f"topology.{kind}" for kind in ("svg", "png")]
    try:
        blocks = topology.save_picture(model.eval(), size, paths)
    except RuntimeError as error:
        raise CommandError(f"--size {size}: {error}") from error
    for block in blocks.values():
        shape = " x ".join(map(str, block.shape))
        say(
            f"{block.name:12} {shape:17} {topology.count(block.parameters).strip():>8} parameters "
            f"{topology.count(block.flops):>8}FLOP"
        )
    say(f"\nwrote {paths[0]} and .png")
    return 0


def _write_json(result: dict[str, Any], path: Path) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")
