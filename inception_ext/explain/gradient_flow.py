"""The gradient that reaches each module over the first steps, with and without auxiliary losses.

The loss is a sum, ``main + w * (aux1 + aux2)``, and so is its gradient: each of the three losses
is differentiated on its own. Two networks train from the same seed on the same batches, one with
the sum, one with the main loss alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from inception_ext._blocks import AUXILIARY, block_names
from inception_ext._console import Progress
from inception_ext._files import replace_file
from inception_ext.losses import GoogLeNetLoss
from inception_ext.training.batches import Batch, Batches
from inception_ext.training.curves import COLOURS
from inception_ext.training.data import open_data
from inception_ext.training.distributed import World
from inception_ext.training.network import HEADS, build_network, set_training
from inception_ext.training.recipe import Recipe, make_optimizer

__all__ = ["FOCUS", "measure", "render", "save_picture"]

FOCUS = "inception3a"  # the module that the sentence at the end is about


def measure(recipe: Recipe, steps: int) -> dict[str, Any]:
    """Trains two networks for so many steps and follows their gradients.

    Returns:
        plain values: ``modules`` (names, in order), ``with`` and ``without``: the gradient's norm,
        a list a step, for each module; ``parts``: with the auxiliary losses, for each module and
        each head a list a step of ``norm`` and ``along`` (the share of the sum's direction: the
        three add up to 1); ``losses``.
    """
    data = open_data(recipe)
    batches = _first(Batches(data, recipe, World("cpu")), steps)
    result: dict[str, Any] = {"steps": steps, "recipe": recipe.as_dict()}
    for side, weight in (("with", recipe.aux_weight), ("without", 0.0)):
        own = replace(recipe, aux_weight=weight)
        with Progress(steps, f"{side} auxiliary losses") as progress:
            result[side] = _train(own, len(data.classes), batches, progress)
    result["modules"] = list(result["with"]["norms"])
    result["parts"] = result["with"].pop("parts")
    result["without"].pop("parts")
    return result


def _first(batches: Batches, steps: int) -> list[Batch]:
    """So many batches, of as many epochs as it takes."""
    found: list[Batch] = []
    for epoch in count():
        for batch in batches.train(epoch):
            if len(batch) > 1:
                found.append(batch)
            if len(found) == steps:
                return found
        if not found:
            raise ValueError("no batch could be read")
    raise AssertionError


def _train(
    recipe: Recipe, num_classes: int, batches: Sequence[Batch], progress: Progress
) -> dict[str, Any]:
    model = build_network(recipe, num_classes)
    modules = {
        name: list(getattr(model, name).parameters())
        for name in (*block_names(model), *AUXILIARY.values(), "fc")
    }
    modules = {name: parameters for name, parameters in modules.items() if parameters}
    optimizer = make_optimizer(recipe, model)
    criterion = GoogLeNetLoss(recipe.aux_weight)
    weights = {"main": 1.0, "aux1": recipe.aux_weight, "aux2": recipe.aux_weight}
    norms: dict[str, list[float]] = {name: [] for name in modules}
    parts: dict[str, Any] = {
        name: {head: {"norm": [], "along": []} for head in HEADS} for name in modules
    }
    losses: dict[str, list[float]] = {head: [] for head in HEADS}
    set_training(model, recipe)
    for step, batch in enumerate(batches):
        images = batch.images.contiguous(memory_format=torch.channels_last)
        values = criterion.parts(model(images), batch.labels)
        gradients = {
            head: _gradients(weights[head] * values[head], modules)
            for head in HEADS
            if weights[head]
        }
        for name, parameters in modules.items():
            total = sum(gradients[head][name] for head in gradients)
            assert isinstance(total, Tensor)
            norm = total.norm().item()
            norms[name].append(norm)
            for head, gradient in gradients.items():
                own = gradient[name]
                parts[name][head]["norm"].append(own.norm().item())
                along = (own @ total).item() / norm**2 if norm else 0.0
                parts[name][head]["along"].append(along)
            for parameter, part in zip(
                parameters, total.split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter).clone()
        for head in HEADS:
            losses[head].append(values[head].item())
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr
        optimizer.step()
        progress.step(f"step {step + 1}")
    return {"norms": norms, "parts": parts, "losses": losses}


def _gradients(
    loss: Tensor, modules: Mapping[str, Sequence[torch.nn.Parameter]]
) -> dict[str, Tensor]:
    """The gradient of a loss for all parameters of each module, as one vector."""
    parameters = [p for own in modules.values() for p in own]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    flat = iter(
        torch.zeros_like(p).flatten() if g is None else g.contiguous().flatten()
        for p, g in zip(parameters, found, strict=True)
    )
    return {name: torch.cat([next(flat) for _ in own]) for name, own in modules.items()}


def shares(result: Mapping[str, Any], module: str = FOCUS) -> dict[str, dict[str, float]]:
    """By head: ``norm``, its norm as a share of the sum of the three norms, and ``along``, its
    share along the gradient itself; means over the steps."""
    parts = result["parts"][module]
    found = {}
    for head in HEADS:
        norm = [
            own / sum(parts[other]["norm"][step] for other in HEADS if parts[other]["norm"])
            for step, own in enumerate(parts[head]["norm"])
        ]
        found[head] = {
            "norm": mean(norm) if norm else 0.0,
            "along": mean(parts[head]["along"]) if norm else 0.0,
        }
    return found


def render(result: Mapping[str, Any]) -> str:
    """The table, and the sentence about 3a."""
    lines = [f"{'module':13}{'without':>10}{'with':>10}{'ratio':>8}     share of main  aux1  aux2"]
    for name in result["modules"]:
        without, both = (median(result[side]["norms"][name]) for side in ("without", "with"))
        ratio = f"{both / without:7.2f}x" if without else f"{'-':>8}"
        own = shares(result, name)
        split = "".join(f"{own[head]['norm']:6.0%}" for head in HEADS)
        lines.append(f"{name:13}{without:10.3g}{both:10.3g}{ratio}           {split}")
    own = shares(result)
    by_norm, along = (
        ", ".join(f"{own[head][kind]:.0%} from {head}" for head in HEADS)
        for kind in ("norm", "along")
    )
    lines += [
        "",
        f"norm of the gradient, median of {result['steps']} steps; without and with the auxiliary "
        "losses",
        f"3a's gradient: {by_norm} by norm; {along} along their sum",
    ]
    return "\n".join(lines)


def save_picture(result: Mapping[str, Any], path: Path) -> None:
    """Norms by module, shares by module, and 3a over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 11), layout="constrained")
    norms, split, focus = figure.subplots(3, 1)
    names = result["modules"]
    x = range(len(names))
    labels = [name.removeprefix("inception") for name in names]
    for side, colour, marker in (("without", "#d95f02", "o"), ("with", "#1b3a6b", "s")):
        values = [result[side]["norms"][name] for name in names]
        norms.plot(
            x,
            [median(v) or float("nan") for v in values],
            color=colour,
            marker=marker,
            label=f"{side} auxiliary losses",
        )
        low, high = [min(v) or float("nan") for v in values], [max(v) for v in values]
        norms.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    norms.set_yscale("log")
    norms.set_ylabel("norm of the gradient")
    norms.set_title(f"Median and range of the first {result['steps']} steps, the same seed")
    norms.legend()

    bottom = [0.0] * len(names)
    for head in HEADS:
        heights = [100 * shares(result, name)[head]["norm"] for name in names]
        split.bar(x, heights, bottom=bottom, color=COLOURS[head], label=head, width=0.8)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    split.set_ylabel("share of the gradient's norm, %")
    split.set_title("Where the gradient comes from, with auxiliary losses")
    split.legend(title="loss", loc="upper left", bbox_to_anchor=(1.0, 1.0))

    steps = range(1, result["steps"] + 1)
    for head in HEADS:
        if result["parts"][FOCUS][head]["norm"]:
            values = result["parts"][FOCUS][head]["norm"]
            focus.plot(steps, values, color=COLOURS[head], label=head)
    focus.plot(
        steps,
        result["without"]["norms"][FOCUS],
        color="#d95f02",
        linestyle="--",
        label="main, trained without",
    )
    focus.set_yscale("log")
    focus.set_ylabel("norm of 3a's gradient")
    focus.set_xlabel("step")
    focus.set_title("3a's gradient from each loss")
    focus.legend(title="loss", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axes in (norms, split):
        axes.set_xticks(list(x), labels, rotation=45)
    for axes in (norms, focus):
        axes.grid(alpha=0.3, which="both")
    replace_file(path, lambda file: figure.savefig(file, dpi=100, format="png"))
