"""The network that a recipe asks for, and what its three softmaxes say in eval mode."""

from typing import Any

import torch
from torch import Tensor, nn

from inception_ext._console import CommandError, say
from inception_ext.bvlc import BVLCGoogLeNet
from inception_ext.convert import load_compatible
from inception_ext.googlenet import GoogLeNet
from inception_ext.training.recipe import Recipe
from inception_ext.weights import GoogLeNet_Weights

__all__ = ["HEADS", "build_network", "forward_heads", "set_training"]

HEADS = ("main", "aux1", "aux2")

_CLASSIFIERS = ("fc", "aux1", "aux2")


def build_network(recipe: Recipe, num_classes: int, *, quiet: bool = False) -> GoogLeNet:
    """A GoogLeNet with both auxiliary heads, seeded by ``recipe.seed``, weights loaded if asked.

    The heads are there whatever ``aux_weight`` is: with 0 they get no gradient and give none, and
    the rest starts from the very same numbers.

    Args:
        num_classes: of the data; classifiers of other widths in ``recipe.weights`` are dropped.
        quiet: do not say what was loaded.

    Raises:
        CommandError: the weights are missing, broken, or of another network.
    """
    torch.manual_seed(recipe.seed)
    dropouts: dict[str, Any] = {"dropout_aux": recipe.dropout_aux}
    if recipe.dropout is not None:
        dropouts["dropout"] = recipe.dropout
    if recipe.variant == "bvlc":
        model: GoogLeNet = BVLCGoogLeNet(num_classes, **dropouts)
    else:
        model = GoogLeNet(num_classes, init_weights=True, **dropouts)
    if recipe.weights is not None:
        _load(model, recipe.weights, quiet)
    if recipe.freeze_backbone:
        for name, child in model.named_children():
            child.requires_grad_(name in _CLASSIFIERS)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _load(model: GoogLeNet, weights: str, quiet: bool) -> None:
    source: Any = weights
    if weights.replace("GoogLeNet_Weights.", "") in GoogLeNet_Weights.__members__:
        # The published weights want images of another mean and deviation.
        model.transform_input = True
        source = GoogLeNet_Weights.verify(weights).get_state_dict(progress=not quiet)
    try:
        report = load_compatible(model, source)
    except (FileNotFoundError, RuntimeError) as error:
        raise CommandError(f"--weights: {error}") from error
    if not quiet:
        say(f"weights: {report}")


def set_training(model: nn.Module, recipe: Recipe) -> None:
    """Training mode; what is frozen stays in eval mode, so that its statistics stay too."""
    model.train()
    if recipe.freeze_backbone:
        for name, child in model.named_children():
            if name not in _CLASSIFIERS and not isinstance(child, nn.Dropout):
                child.eval()


def forward_heads(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Logits ``[N, num_classes]`` of every head that the model has, by the names in HEADS.

    Whatever mode the model is in; a GoogLeNet itself runs its auxiliary heads in training only.
    """
    x = model._to_4a(model._transform_input(images))
    logits = {} if model.aux1 is None else {"aux1": model.aux1(x)}
    x = model._to_4d(x)
    if model.aux2 is not None:
        logits["aux2"] = model.aux2(x)
    main = model.forward_head(model._to_5b(x))
    return {"main": main, **logits}
