"""Run the main job on real input: photographs through the network, digits to train it on.

Four steps: what is installed; photographs through eager PyTorch and through freeze(), with the
same weights; a GoogLeNet with both auxiliary heads trained on handwritten digits; that network,
frozen, on digits that it has not seen. The exit status is 1 where a check fails.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inception_ext._console import CommandError, heading, require, say
from inception_ext.cli import info
from inception_ext.cli._timing import cpu_in_use, interleaved_medians

__all__ = ["add_arguments", "run"]

FLOOR = 1e-5  # error that is always right, relative to the largest logit
ACCURACY = 0.95  # of the main head on held-out digits


@dataclass
class Report:
    """What the run found; becomes summary.json."""

    quick: bool
    seed: int
    threads: int = field(default_factory=torch.get_num_threads)
    results: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, ok: bool, text: str) -> None:
        self.checks.append({"ok": ok, "text": text})
        say(f"  {'ok    ' if ok else 'FAILED'} {text}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/demo"),
        help="for loss_curves.png and summary.json (default: runs/demo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--epochs", type=_positive, default=3, help="of the training (default: 3)")
    parser.add_argument("--threads", type=_positive, help="of PyTorch (default: its own choice)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything; accuracy is not checked"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {value}")
    return value


def run(args: argparse.Namespace) -> int:
    require(
        "demo",
        skimage="scikit-image",
        sklearn="scikit-learn",
        matplotlib="matplotlib",
        tqdm="tqdm",
    )
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output-dir {args.output_dir}: {error.strerror}") from error

    start = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    report = Report(quick=args.quick, seed=args.seed)
    heading("1. What is installed")
    say(info.render(info.collect()))
    _warn_of_company()
    _photographs(report)
    _digits(report, args)
    report.results["seconds"] = round(time.perf_counter() - start, 1)

    summary = args.output_dir / "summary.json"
    summary.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    failed = [check["text"] for check in report.checks if not check["ok"]]
    heading("Result")
    say(f"  {len(report.checks) - len(failed)} of {len(report.checks)} checks passed")
    for text in failed:
        say(f"  FAILED {text}")
    say(f"  {report.results['seconds']:.0f} s with {report.threads} threads")
    say(f"  wrote {args.output_dir / 'loss_curves.png'} and {summary}")
    return 1 if failed else 0


def _warn_of_company() -> None:
    """Threads that wait for one another suffer badly where other programs hold the cores."""
    busy, cores = cpu_in_use()
    if busy + torch.get_num_threads() > cores + 0.5:
        say(
            f"\n  Note: other programs hold {busy:.1f} of {cores} cores. "
            "Expect poor times, and try --threads 1."
        )


def _photographs(report: Report) -> None:
    """Step 2."""
    from inception_ext import freeze
    from inception_ext.cli._eager import eager_twin
    from inception_ext.cli._photographs import load_batch, network

    heading("2. Photographs through eager PyTorch and through freeze()")
    names, images = load_batch(2 if report.quick else 8)
    model, origin = network(report.seed)
    eager_name, eager = eager_twin(model)
    engine = freeze(model)
    say(f"  weights: {origin}")
    say(f"  eager: {eager_name}, channels_last, float32")

    exact = eager_twin(copy.deepcopy(model).double())[1](images.double())  # [N, 1000]
    ours, theirs = engine(images), eager(images)
    scale = exact.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    errors = {
        "freeze": (ours - exact).abs().max().item(),
        "eager": (theirs - exact).abs().max().item(),
    }
    top = {name: x.topk(5).indices for name, x in (("freeze", ours), ("eager", theirs))}
    agree = (top["freeze"] == top["eager"]).all(1)  # [N]

    say(f"\n  {'photograph':22}{'top-5, eager':28}{'top-5, freeze':28}largest difference")
    for i, name in enumerate(names):
        eager_top, our_top = (
            " ".join(str(label) for label in top[side][i].tolist()) for side in ("eager", "freeze")
        )
        largest = (ours[i] - theirs[i]).abs().max().item()
        say(f"  {name:22}{eager_top:28}{our_top:28}{largest:.1e}")

    say()
    times = {}
    for batch in sorted({1, len(images)}):
        some = images[:batch]
        medians = interleaved_medians(
            {"eager": partial(eager, some), "freeze": partial(engine, some)},
            seconds=0.2 if report.quick else 2,
        )
        times[batch] = {name: 1e3 * seconds / batch for name, seconds in medians.items()}
        say(_speed_line(f"batch {batch}", times[batch]))
    say()
    limit = 2 * errors["eager"] + FLOOR * scale
    report.check(
        errors["freeze"] <= limit,
        f"logits: largest difference from eager {difference:.1e}; from float64 "
        f"{errors['freeze']:.1e}, eager itself {errors['eager']:.1e} (largest logit {scale:.2f})",
    )
    report.check(
        bool(agree.all()), f"the same top-5 for {int(agree.sum())} of {len(names)} photographs"
    )
    report.results["photographs"] = {
        "names": names,
        "weights": origin,
        "eager": eager_name,
        "largest_difference": difference,
        "error_against_float64": errors,
        "top5_agree": int(agree.sum()),
        "ms_per_image": times,
    }


def _digits(report: Report, args: argparse.Namespace) -> None:
    """Steps 3 and 4."""
    from inception_ext import googlenet
    from inception_ext.cli._curves import save_loss_curves
    from inception_ext.cli._digits import load_digits
    from inception_ext.cli._training import HEADS, Recipe, head_logits, train

    heading("3. GoogLeNet with both auxiliary heads learns handwritten digits")
    size = 32 if report.quick else 64
    digits = load_digits(size=size, seed=args.seed)
    count = 256 if report.quick else len(digits.train_labels)
    recipe = Recipe(epochs=1 if report.quick else args.epochs)
    say(
        f"  {count} digits of {size} x {size} to learn from, {len(digits.test_labels)} held out; "
        f"{recipe.epochs} epochs of AdamW, batch {recipe.batch_size}, "
        f"loss = main + 0.3 * (aux1 + aux2)"
    )
    torch.manual_seed(args.seed)
    model = googlenet(num_classes=10, init_weights=True)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    history = train(
        model, digits.train_images[:count], digits.train_labels[:count], recipe, seed=args.seed
    )

    logits = head_logits(model, digits.test_images)
    accuracy = {name: _accuracy(logits[name], digits.test_labels) for name in HEADS}
    say("\n  accuracy on held-out digits")
    for name in HEADS:
        say(f"    {name:5} softmax {accuracy[name]:7.2%}")
    title = "GoogLeNet on handwritten digits; held-out accuracy: " + ", ".join(
        f"{name} {accuracy[name]:.1%}" for name in HEADS
    )
    save_loss_curves(history, args.output_dir / "loss_curves.png", title)
    say()
    if report.quick:
        say("  (accuracy is not checked in a quick run)")
    else:
        report.check(
            accuracy["main"] >= ACCURACY,
            f"main head at {accuracy['main']:.2%}, at least {ACCURACY:.0%} asked",
        )
    report.results["digits"] = {
        "recipe": asdict(recipe),
        "size": size,
        "train": count,
        "test": len(digits.test_labels),
        "seconds": round(history.seconds, 1),
        "accuracy": accuracy,
        "losses": history.losses,
    }
    _held_out(report, model, digits.test_images, digits.test_labels)


def _held_out(report: Report, model: Any, images: Tensor, labels: Tensor) -> None:
    """Step 4."""
    from inception_ext import freeze
    from inception_ext.cli._eager import eager_twin

    heading("4. The trained network, frozen, on held-out digits")
    eager_name, eager = eager_twin(model)
    engine = freeze(model.eval())
    predictions = {
        name: torch.cat([call(part).argmax(1) for part in images.split(60)])
        for name, call in (("eager", eager), ("freeze", engine))
    }
    same = int((predictions["eager"] == predictions["freeze"]).sum())
    correct = (predictions["freeze"] == labels).double().mean().item()
    some = images[:60]
    medians = interleaved_medians(
        {"eager": partial(eager, some), "freeze": partial(engine, some)},
        seconds=0.2 if report.quick else 2,
    )
    times = {name: 1e3 * seconds / len(some) for name, seconds in medians.items()}
    say(f"  eager: {eager_name}, channels_last, float32; the frozen one gets {correct:.2%} right")
    say(_speed_line(f"batch {len(some)}", times))
    say()
    report.check(same == len(labels), f"the same prediction for {same} of {len(labels)} digits")
    report.results["held_out"] = {
        "same_predictions": same,
        "accuracy": correct,
        "ms_per_image": times,
    }


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _speed_line(what: str, times: dict[str, float]) -> str:
    ratio = times["eager"] / times["freeze"]
    return (
        f"  {what:9} eager {times['eager']:7.2f} ms/image   freeze {times['freeze']:7.2f} ms/image"
        f"   {ratio:.2f}x"
    )
