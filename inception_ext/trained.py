"""A trained network out of a file, with what is needed to use it."""

import os
from dataclasses import dataclass
from typing import Any

from inception_ext._checkpoint import load_strict, read_content, state_dict_in
from inception_ext.bvlc import BVLCGoogLeNet
from inception_ext.googlenet import GoogLeNet
from inception_ext.weights import GoogLeNet_Weights

__all__ = ["Trained", "load_trained"]


@dataclass
class Trained:
    """model: in eval mode; classes: names; resize, crop: how images are brought to it."""

    model: GoogLeNet
    classes: list[str]
    resize: int = 256
    crop: int = 224


def load_trained(weights: str, averaged: bool = False) -> Trained:
    """Builds the network that the weights belong to, whichever variant it is.

    Args:
        weights: a checkpoint of ``inception_ext train``, any other file with a state_dict, or the
            name of the published weights.
        averaged: the averaged weights (``--model-ema``) of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: a file that is broken, or not of a GoogLeNet; the message names it.
    """
    published = GoogLeNet_Weights.DEFAULT
    if weights.replace("GoogLeNet_Weights.", "") in GoogLeNet_Weights.__members__:
        model = GoogLeNet(1000, transform_input=True, aux_logits=False, init_weights=False)
        state = published.get_state_dict(progress=True, check_hash=True)
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("aux")})
        return Trained(model.eval(), list(published.meta["categories"]))

    content = read_content(weights)
    facts = content if isinstance(content, dict) else {}
    if averaged and not facts.get("ema"):
        raise RuntimeError(f"the checkpoint {weights} holds no averaged weights")
    state = state_dict_in(facts["ema"] if averaged else content, weights)
    model = _network(state, weights)
    is_published = os.path.basename(weights) == os.path.basename(published.url)
    sizes = facts.get("input", {})
    model.transform_input = bool(sizes.get("transform_input", is_published))
    number = int(state["fc.weight"].shape[0])
    classes = facts.get("classes")
    if not classes:
        known = number == len(published.meta["categories"])
        classes = published.meta["categories"] if known else [f"class {i}" for i in range(number)]
    crop = sizes.get("crop", 224)
    return Trained(model.eval(), list(classes), sizes.get("resize", 256), crop)


def _network(state: dict[str, Any], name: str) -> GoogLeNet:
    """An untrained network of the kind that a state_dict is of, with that loaded."""
    try:
        num_classes = state["fc.weight"].shape[0]
        kernel_size = state["inception3a.branch3.1.conv.weight"].shape[-1]
    except KeyError as error:
        raise RuntimeError(f"the checkpoint {name} is not of a GoogLeNet: no {error}") from error
    heads = any(key.startswith("aux") for key in state)
    model: GoogLeNet
    if "conv1.conv.bias" in state:
        model = BVLCGoogLeNet(num_classes, aux_logits=heads, init_weights=False)
    else:
        model = GoogLeNet(
            num_classes, aux_logits=heads, init_weights=False, branch3_kernel_size=kernel_size
        )
    load_strict(model, state, name)
    return model
