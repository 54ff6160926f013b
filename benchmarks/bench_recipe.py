"""The training recipe on real digits: with and without auxiliary heads, fused and eager.

    python benchmarks/bench_recipe.py --json result.json     # runs what is missing, then collects
    python benchmarks/bench_recipe.py --only with-0          # one of the runs
    python benchmarks/bench_recipe.py --render result.json   # the README's section

Every run is a command of ``python -m inception_ext``; the result file holds them, and what they
measured. A run that is finished is not run again; one that was interrupted goes on.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from environment import Company, commit, describe

SCHEMA, SCHEMA_VERSION = "inception_ext.bench_recipe", 1
SEEDS = (0, 1, 2)
EPOCHS = 3
HEADS = ("main", "aux1", "aux2")

DIGITS = (
    "digits",
    "--train-crop-size",
    "32",
    "--batch-size",
    "32",
    "--opt",
    "adamw",
    "--lr",
    "1e-3",
)
TRAIN = ("train", *DIGITS, "--epochs", str(EPOCHS), "--lr-warmup-epochs", "0.5", "--wd", "0.05")
FLOW = ("explain", "gradient-flow", *DIGITS, "--steps", "10")
TIMED_STEPS, WARM_UP = 25, 5


def commands(threads: int) -> dict[str, list[str]]:
    """All runs, by name: the arguments of ``python -m inception_ext``."""
    runs: dict[str, list[str]] = {}
    for seed in SEEDS:
        runs[f"with-{seed}"] = [*TRAIN, "--seed", str(seed)]
        runs[f"without-{seed}"] = [*TRAIN, "--seed", str(seed), "--aux-weight", "0"]
    runs["eager-0"] = [*TRAIN, "--seed", "0", "--no-fused"]
    # The same once more, rounded otherwise: what rounding alone does to a curve.
    runs["nchw-0"] = [*TRAIN, "--seed", "0", "--no-fused", "--no-channels-last"]
    for variant in ("torchvision", "bvlc"):
        for seed in SEEDS:
            runs[f"flow-{variant}-{seed}"] = [*FLOW, "--seed", str(seed), "--variant", variant]
    return {name: [*run, "--threads", str(threads)] for name, run in runs.items()}


def is_finished(folder: Path) -> bool:
    if (folder / "gradient_flow.json").exists():
        return True
    path = folder / "epochs.json"
    facts = json.loads(path.read_text()) if path.exists() else {"epochs": [], "recipe": None}
    return bool(facts["recipe"]) and len(facts["epochs"]) == facts["recipe"]["epochs"]


def run(arguments: list[str], folder: Path) -> None:
    if is_finished(folder):
        return
    command = [sys.executable, "-m", "inception_ext", *arguments, "--output-dir", str(folder)]
    if list(folder.glob("checkpoint-*.pt")):
        command.append("--resume")
    print(" ".join(command[1:]), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commit").write_text(commit() or "unknown")
    env = {**os.environ, "OMP_NUM_THREADS": arguments[-1]}
    subprocess.run(command, check=True, env=env)
    for path in folder.glob("*.pt"):
        path.unlink()  # 100 MB each


def read_steps(folder: Path) -> dict[str, list[float]]:
    lines = (folder / "steps.csv").read_text().splitlines()
    names = lines[0].split(",")
    columns = zip(*(line.split(",") for line in lines[1:]), strict=True)
    return {
        name: [float(v) if v else float("nan") for v in column]
        for name, column in zip(names, columns, strict=True)
    }


def collect(folders: dict[str, Path], plan: dict[str, list[str]]) -> dict[str, Any]:
    """The result file."""
    result: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **describe()}
    result["commands"] = {
        name: f"python -m inception_ext {shlex.join(arguments)} --output-dir runs/recipe/{name}"
        for name, arguments in plan.items()
    }
    result["commit"] = ", ".join(sorted({(f / "commit").read_text() for f in folders.values()}))
    result["training"] = []
    for name in plan:
        side, _, seed = name.partition("-")
        if side not in ("with", "without", "eager", "nchw"):
            continue
        epochs = json.loads((folders[name] / "epochs.json").read_text())["epochs"]
        steps = read_steps(folders[name])
        result["training"].append(
            {
                "name": name,
                "heads": side != "without",
                "fused": side in ("with", "without"),
                "seed": int(seed),
                "test": [epoch["test"] for epoch in epochs],
                "seconds": [epoch["seconds"] for epoch in epochs],
                "losses": {head: steps[head] for head in HEADS},
            }
        )
    result["gradient_share_3a"] = []
    for name in plan:
        if name.startswith("flow-"):
            flow = json.loads((folders[name] / "gradient_flow.json").read_text())
            _, variant, seed = name.split("-")
            norms = {
                side: statistics.median(flow[side]["norms"]["inception3a"])
                for side in ("with", "without")
            }
            result["gradient_share_3a"].append(
                {
                    "variant": variant,
                    "seed": int(seed),
                    "shares": flow["shares"]["inception3a"],
                    "median_norm": norms,
                }
            )
    return result


def time_steps(threads: int) -> dict[str, Any]:
    """Seconds of training steps, optimizer included, fused and eager in turns on the same batches.

    CPU time of the process: where others use the cores too, the wall clock measures them.
    """
    import torch

    from inception_ext.functional import use_kernels
    from inception_ext.training.data import open_data
    from inception_ext.training.distributed import World
    from inception_ext.training.loop import Output, Trainer
    from inception_ext.training.network import set_training
    from inception_ext.training.recipe import Recipe
    from inception_ext.training.report import Pace

    torch.set_num_threads(threads)
    images, size = 16, 64
    recipe = Recipe(
        synthetic=True,
        synthetic_size=images * (TIMED_STEPS + WARM_UP),
        num_classes=10,
        batch_size=images,
        train_crop_size=size,
        lr=1e-3,
    )
    data = open_data(recipe)
    trainers = {}
    for kind in ("fused", "eager"):
        trainer = Trainer(recipe, data, World("cpu"), Output(Path("unused")))
        trainer._pace = Pace()
        set_training(trainer.state.model, recipe)
        trainers[kind] = trainer
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    observer = Company()
    for number, batch in enumerate(trainers["fused"].batches.train(0)):
        for kind in sorted(trainers, reverse=bool(number % 2)):
            with use_kernels(kind == "fused"):
                start = time.process_time()
                trainers[kind]._step(batch)
                seconds[kind].append(time.process_time() - start)
    return {
        "images": images,
        "size": size,
        "threads": threads,
        "others_cores": observer.cores(),
        "cpu_seconds": {kind: values[WARM_UP:] for kind, values in seconds.items()},
    }


def render(result: dict[str, Any]) -> str:
    """The README's section, from the numbers alone."""
    machine, training = result["machine"], result["training"]

    def finals(heads: bool, head: str) -> list[float]:
        return [
            run["test"][-1][f"accuracy_{head}"]
            for run in training
            if run["fused"] and run["heads"] == heads
        ]

    def spread(values: list[float]) -> str:
        each = ", ".join(f"{100 * value:.2f}" for value in values)
        return f"**{100 * statistics.mean(values):.2f}** ({each})"

    lines = [
        f"{machine['cpu']}, {result['threads_per_run']} thread a run, torch "
        f"{result['versions']['torch']}, {result['date'][:10]}; 1,437 digits of 32 x 32 to learn "
        f"from, 360 held out, {EPOCHS} epochs, seeds {', '.join(map(str, SEEDS))}. Mean accuracy "
        "in percent, in brackets that of each seed.",
        "",
        "| | main softmax | aux1 | aux2 |",
        "|---|---:|---:|---:|",
    ]
    for heads, name in ((True, "with auxiliary losses"), (False, "without")):
        cells = [
            spread(finals(heads, head)) if heads or head == "main" else "untrained"
            for head in HEADS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Where the gradient of 3a comes from in the first 10 steps (shares of norm, mean of the "
        "seeds), and its median norm:",
        "",
        "| network | main | aux1 | aux2 | norm without the heads | with |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for variant, name in (("torchvision", "with batch norm"), ("bvlc", "of the paper, without")):
        rows = [row for row in result["gradient_share_3a"] if row["variant"] == variant]
        shares = [statistics.mean(row["shares"][head]["norm"] for row in rows) for head in HEADS]
        norms = [
            statistics.mean(row["median_norm"][side] for row in rows)
            for side in ("without", "with")
        ]
        cells = [f"{share:.0%}" for share in shares] + [f"{norm:.2g}" for norm in norms]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    fused = next(run for run in training if run["name"] == "with-0")
    eager = next(run for run in training if run["name"] == "eager-0")
    first = abs(fused["losses"]["main"][0] / eager["losses"]["main"][0] - 1)
    nchw = next(run for run in training if run["name"] == "nchw-0")
    last = [run["test"][-1]["accuracy_main"] for run in (fused, eager, nchw)]

    def apart(run: dict[str, Any]) -> float:
        """Mean distance of the main loss from eager's, over all steps."""
        pairs = zip(run["losses"]["main"], eager["losses"]["main"], strict=True)
        return statistics.mean(abs(a - b) for a, b in pairs)

    steps = result["steps"]
    times = {kind: 1e3 * statistics.median(v) for kind, v in steps["cpu_seconds"].items()}
    lines += [
        "",
        f"Fused against eager, seed 0: the first loss differs by {first:.0e} of itself, later ones "
        f"as rounding grows, on average by {apart(fused):.3f}; eager in NCHW, the same "
        f"computation rounded otherwise, is {apart(nchw):.3f} away from eager in channels_last. "
        f"After {EPOCHS} epochs the main softmax is right for {last[0]:.2%} (fused), "
        f"{last[1]:.2%} (eager) and {last[2]:.2%} (eager, NCHW). A training step of "
        f"{steps['images']} images of {steps['size']} x {steps['size']}, optimizer included, takes "
        f"{times['fused']:.0f} ms of CPU time fused and {times['eager']:.0f} ms eager "
        f"({times['eager'] / times['fused']:.2f}x; medians of {len(steps['cpu_seconds']['fused'])} "
        f"steps each, in turns, one thread; other programs used {steps['others_cores']:.1f} of "
        f"{machine['cores']} cores meanwhile).",
    ]
    return "\n".join(lines)


def save_curves(result: dict[str, Any], path: Path) -> None:
    """The loss of the main softmax by step, fused and eager, one over the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour, width, style in (
        ("with-0", "#1f77b4", 2.5, "-"),
        ("eager-0", "#222222", 1.0, "--"),
        ("nchw-0", "#d95f02", 1.0, ":"),
    ):
        run = next(run for run in result["training"] if run["name"] == name)
        label = {"with-0": "fused", "eager-0": "eager", "nchw-0": "eager, NCHW"}[name]
        values = run["losses"]["main"]
        axes.plot(values, color=colour, linewidth=width, linestyle=style, alpha=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("main loss of a batch")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/recipe"), help="of all runs")
    parser.add_argument("--only", metavar="NAME,...", help="runs whose names start so; no result")
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)")
    parser.add_argument("--json", type=Path, help="the result file; curves beside it, as PNG")
    parser.add_argument("--render", type=Path, metavar="JSON", help="print the README's section")
    args = parser.parse_args()
    if args.render:
        print(render(json.loads(args.render.read_text())))
        return
    plan = commands(args.threads)
    folders = {name: args.folder / name for name in plan}
    for name, arguments in plan.items():
        if not args.only or name.startswith(tuple(args.only.split(","))):
            run(arguments, folders[name])
    if args.json:
        result = collect(folders, plan)
        result["steps"] = time_steps(args.threads)
        result["threads_per_run"] = args.threads
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        save_curves(result, args.json.with_suffix(".png"))
        print(render(result))


if __name__ == "__main__":
    main()
