"""Train GoogLeNet with its auxiliary heads, in one process or in many.

DATA is
  digits                the 1,797 handwritten digits of scikit-learn
  FOLDER                one folder a class, or such folders below train/ and val/
  shards-{000..099}.tar WebDataset shards (.jpg or .png, and .cls); test shards: --val-data

Under torchrun all processes train together (gloo on the CPU, nccl on GPUs):
  torchrun --nproc_per_node=2 -m inception_ext train DATA

The output folder gets steps.csv, epochs.json, curves.png and checkpoints. SIGTERM and SIGINT finish
the step, save, and exit with status 0; --resume goes on with the same numbers.
"""

import argparse
import json
import os
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from inception_ext._console import CommandError, require, say
from inception_ext._files import make_folder, write_text
from inception_ext.cli._arguments import fraction, non_negative, positive, positive_float
from inception_ext.functional import use_kernels
from inception_ext.training.recipe import Recipe

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Recipe()
    parser.set_defaults(**defaults.as_dict())

    data = parser.add_argument_group("data")
    data.add_argument("data", nargs="?", metavar="DATA", help="see above")
    data.add_argument("--synthetic", action="store_true", help="random images instead of DATA")
    data.add_argument(
        "--synthetic-size", type=positive, metavar="N", help="how many an epoch (default: 1024)"
    )
    data.add_argument("--val-data", metavar="DATA", help="what to test on, if not below DATA")
    data.add_argument(
        "--val-share", type=fraction, help="share held out where DATA is not divided (0.2)"
    )
    data.add_argument("--num-classes", type=positive, metavar="N", help="width of the classifiers")
    data.add_argument(
        "--samples-per-epoch", type=positive, metavar="N", help="of shards; default: counted"
    )
    data.add_argument(
        "-b", "--batch-size", type=positive, metavar="N", help="of each process (default: 32)"
    )
    data.add_argument(
        "-j", "--workers", type=non_negative, metavar="N", help="of each process that read images"
    )
    for name, what in (
        ("train-crop-size", "of random crops (default: 224; digits: 64)"),
        ("val-resize-size", "of the shorter side, in the test (default: 8/7 of the crop)"),
        ("val-crop-size", "of the middle, in the test (default: as in training)"),
    ):
        data.add_argument(f"--{name}", type=positive, metavar="PIXELS", help=what)
    data.add_argument(
        "--auto-augment", choices=["ra", "ta_wide", "augmix", "imagenet"], help="policy"
    )
    data.add_argument("--random-erase", type=fraction, metavar="P", help="probability (default: 0)")
    data.add_argument("--mixup-alpha", type=positive_float, metavar="A", help="turns mixup on")
    data.add_argument("--cutmix-alpha", type=positive_float, metavar="A", help="turns cutmix on")

    network = parser.add_argument_group("network")
    network.add_argument(
        "--variant", choices=["torchvision", "bvlc"], help="bvlc: that of the paper, without norms"
    )
    network.add_argument(
        "--weights",
        metavar="FILE",
        help="to start from (what fits is loaded), or DEFAULT: the published ones",
    )
    network.add_argument("--dropout", type=fraction, metavar="P", help="before the main classifier")
    network.add_argument("--dropout-aux", type=fraction, metavar="P", help="default: 0.7")
    network.add_argument(
        "--aux-weight", type=float, metavar="W", help="of both auxiliary losses (default: 0.3)"
    )
    network.add_argument(
        "--freeze-backbone", action="store_true", help="train the three classifiers only"
    )
    network.add_argument(
        "--sync-bn", action="store_true", help="batch norm over the batches of all processes"
    )

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--epochs", type=positive, metavar="N", help="default: 90")
    steps.add_argument("--opt", choices=["sgd", "sgd_nesterov", "rmsprop", "adamw"])
    steps.add_argument("--lr", type=positive_float, help="default: 0.1")
    steps.add_argument("--momentum", type=fraction, help="default: 0.9")
    steps.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=float, help="default: 1e-4"
    )
    steps.add_argument("--norm-weight-decay", type=float, help="of batch norms; 0: none")
    steps.add_argument("--bias-weight-decay", type=float, help="of biases; 0: none")
    steps.add_argument("--label-smoothing", type=fraction, help="default: 0")
    steps.add_argument(
        "--lr-scheduler", choices=["cosineannealinglr", "steplr", "exponentiallr", "constant"]
    )
    steps.add_argument("--lr-warmup-epochs", type=float, metavar="N", help="linear (default: 0)")
    steps.add_argument("--lr-warmup-decay", type=fraction, help="where it starts (default: 0.01)")
    steps.add_argument("--lr-step-size", type=positive, metavar="EPOCHS", help="default: 30")
    steps.add_argument("--lr-gamma", type=float, help="default: 0.1")
    steps.add_argument("--lr-min", type=float, help="of the cosine (default: 0)")
    steps.add_argument("--clip-grad-norm", type=positive_float, metavar="NORM")
    steps.add_argument("--model-ema", action="store_true", help="also average the weights")
    steps.add_argument("--model-ema-steps", type=positive, metavar="N", help="default: 32")
    steps.add_argument("--model-ema-decay", type=fraction, help="default: 0.99998")

    how = parser.add_argument_group("how it runs")
    how.add_argument("--device", help="auto (default), cpu, or cuda")
    how.add_argument("--amp", choices=["fp16", "bf16"], help="mixed precision")
    how.add_argument("--channels-last", action=argparse.BooleanOptionalAction)
    how.add_argument("--fused", action=argparse.BooleanOptionalAction, help="use our kernels")
    how.add_argument("--compile", action="store_true", help="torch.compile")
    how.add_argument("--use-deterministic-algorithms", "--deterministic", action="store_true")
    how.add_argument("--seed", type=non_negative, help="of everything random (default: 0)")
    how.add_argument("--threads", type=positive, help="of PyTorch, of each process")

    output = parser.add_argument_group("output")
    output.add_argument("--output-dir", type=Path, default=Path("runs/train"), metavar="DIR")
    output.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from the newest checkpoint in the output folder, or from a file",
    )
    output.add_argument(
        "--test-only", action="store_true", help="test --resume or --weights, and end"
    )
    output.add_argument(
        "--print-freq", type=positive, default=10, metavar="STEPS", help="away from a terminal"
    )
    output.add_argument(
        "--save-every", type=positive, metavar="STEPS", help="checkpoints within epochs too"
    )
    output.add_argument("--keep", type=positive, default=2, help="checkpoints (default: 2)")
    output.add_argument("--tensorboard", action="store_true", help="write event files too")


def run(args: argparse.Namespace) -> int:
    require("train", torchvision="torchvision", matplotlib="matplotlib", tqdm="tqdm")
    from inception_ext.training.distributed import World
    from inception_ext.training.stop import StopRequest

    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    if args.threads:
        torch.set_num_threads(args.threads)
    if recipe.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        world = World(recipe.device)
    except ValueError as error:
        raise CommandError(str(error)) from error
    kernels: Any = nullcontext() if recipe.fused else use_kernels(False)
    try:
        with StopRequest() as stop, kernels:
            return _train(args, recipe, world, stop)
    finally:
        world.close()


def _train(args: argparse.Namespace, recipe: Recipe, world: Any, stop: Any) -> int:
    from inception_ext.training import checkpoint
    from inception_ext.training.data import open_data
    from inception_ext.training.loop import Output, Trainer

    folder: Path = args.output_dir
    data = open_data(recipe)
    found: tuple[Path, dict[str, Any]] | None = None
    if args.resume is not None:
        path = Path(args.resume)
        found = (path, checkpoint.read(path)) if args.resume else checkpoint.newest(folder)
    elif not args.test_only and checkpoint.all_in(folder):
        raise CommandError(f"{folder} holds a run already: --resume, or another --output-dir")
    make_folder(folder)
    output = Output(folder, args.print_freq, args.save_every, args.keep, args.tensorboard)
    trainer = Trainer(recipe, data, world, output)
    if world.is_main and not args.test_only:
        _say_what(recipe, trainer, world)
    if args.test_only:
        return _test(args, trainer, found)
    if found is not None:
        trainer.resume(*found)
    if trainer.run(stop) and world.is_main:
        say(f"wrote {folder}")
    return 0


def _say_what(recipe: Recipe, trainer: Any, world: Any) -> None:
    data, batches = trainer.data, trainer.batches
    test = "none" if data.test is None else len(data.test)
    say(
        f"{len(data.train)} images to learn from, {test} to test on, {len(data.classes)} classes; "
        f"{recipe.epochs} epochs of {batches.steps_per_epoch} steps of "
        f"{recipe.batch_size}{f' x {world.size}' if world.is_distributed else ''} images; "
        f"loss = main + {recipe.aux_weight:g} * (aux1 + aux2); {world.device}, "
        f"{recipe.amp or 'float32'}"
    )


def _test(args: argparse.Namespace, trainer: Any, found: tuple[Path, dict[str, Any]] | None) -> int:
    if found is None and trainer.recipe.weights is None:
        raise CommandError("--test-only wants --resume or --weights")
    if trainer.data.test is None:
        raise CommandError("--test-only: there is nothing to test on; give --val-data")
    if found is not None:
        trainer.state.load_model(found[1], str(found[0]))
    result = trainer.test(trainer.state.model)
    if result is None:
        raise CommandError("--test-only: no image could be read")
    if trainer.world.is_main:
        for head in ("main", "aux1", "aux2"):
            say(
                f"  {head:5} accuracy {result[f'accuracy_{head}']:7.2%}   "
                f"loss {result[f'loss_{head}']:.4f}"
            )
        write_text(args.output_dir / "test.json", json.dumps(result, indent=2) + "\n")
    return 0
