"""Moving an existing torchvision GoogLeNet, or its weights, to this package."""

import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from inception_ext._checkpoint import read_state_dict
from inception_ext.googlenet import GoogLeNet
from inception_ext.modules import BasicConv2d, Inception, InceptionAux

__all__ = ["LoadReport", "accelerate", "load_compatible", "restore"]

M = TypeVar("M", bound=nn.Module)

# Class of torchvision.models.googlenet -> its counterpart, the children that its forward() uses.
_COUNTERPARTS: dict[str, tuple[type[nn.Module], set[str]]] = {
    "BasicConv2d": (BasicConv2d, {"conv", "bn"}),
    "Inception": (Inception, {"branch1", "branch2", "branch3", "branch4"}),
    "InceptionAux": (InceptionAux, {"conv", "fc1", "fc2", "dropout"}),
    "GoogLeNet": (
        GoogLeNet,
        {"maxpool1", "maxpool2", "maxpool3", "maxpool4", "avgpool", "dropout", "fc"},
    ),
}


def accelerate(model: M) -> M:
    """Makes the torchvision GoogLeNet blocks in a model run this package's code, in place.

    Every ``BasicConv2d``, ``Inception``, ``InceptionAux`` and ``GoogLeNet`` of
    ``torchvision.models.googlenet`` within the model, itself included, stays the very object that
    it is, with its parameters, buffers, children, hooks and mode; only its class becomes one that
    derives from this package's block and from torchvision's. So optimizers, wrappers and other
    references stay valid, ``isinstance`` checks hold, copying and pickling work, and a training
    network still returns torchvision's ``GoogLeNetOutputs``. Subclasses are left as they are,
    since they may have a forward pass of their own; the blocks within them are not.

    Args:
        model: a torchvision GoogLeNet, or any module that holds one or blocks of one.

    Returns:
        the same model. Calling this a second time changes nothing.

    Raises:
        ValueError: the model holds no such block.
    """
    blocks = [(module, _counterpart(module)) for module in model.modules()]
    if not any(ours or _is_accelerated(module) for module, ours in blocks):
        raise ValueError(
            f"accelerate() found no block of torchvision.models.googlenet in {_name(type(model))}"
            + (
                ", which is built of inception_ext blocks already"
                if any(isinstance(module, BasicConv2d) for module, _ in blocks)
                else ""
            )
        )
    for module, ours in blocks:
        if ours is not None:
            original: Any = type(module)
            module.__class__ = _accelerated_class(original, ours)
    return model


def restore(model: M) -> M:
    """Undoes :func:`accelerate`, in place; leaves alone what was not accelerated.

    Returns:
        the same model.
    """
    for module in model.modules():
        if _is_accelerated(module):
            module.__class__ = type(module)._accelerated_from  # type: ignore[attr-defined]
    return model


def _counterpart(module: nn.Module) -> Any:
    cls = type(module)
    if cls.__module__ != "torchvision.models.googlenet" or cls.__name__ not in _COUNTERPARTS:
        return None
    ours, children = _COUNTERPARTS[cls.__name__]
    # torchvision of another age may have other children.
    return ours if children <= dict(module.named_children()).keys() else None


def _is_accelerated(module: nn.Module) -> bool:
    return hasattr(type(module), "_accelerated_from")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def _accelerated_class(original: Any, ours: Any) -> Any:
    """A class with the methods of ours that is also an original."""
    namespace: dict[str, Any] = {
        "__module__": __name__,
        "__init__": original.__init__,
        "__reduce_ex__": _reduce_accelerated,
        "_accelerated_from": original,
    }
    if issubclass(ours, GoogLeNet):
        namespace["eager_outputs"] = original.eager_outputs  # returns torchvision's namedtuple
    return type(original.__name__, (ours, original), namespace)


def _reduce_accelerated(module: nn.Module, protocol: object) -> tuple[Any, ...]:
    """Pickles the two classes that a class made here derives from, not the class."""
    ours, original = type(module).__bases__
    return _new_accelerated, (original, ours), module.__dict__


def _new_accelerated(original: Any, ours: Any) -> nn.Module:
    cls = _accelerated_class(original, ours)
    return cls.__new__(cls)


@dataclass(frozen=True, repr=False)
class LoadReport:
    """What :func:`load_compatible` did, in the names of the model's state_dict.

    Attributes:
        loaded: entries that were copied into the model.
        dropped: entries that were not, each with the reason.
        newly_initialised: entries of the model that keep the values they had.
    """

    loaded: list[str]
    dropped: dict[str, str]
    newly_initialised: list[str]

    def __repr__(self) -> str:
        lines = [
            f"LoadReport({len(self.loaded)} loaded, {len(self.dropped)} dropped, "
            f"{len(self.newly_initialised)} newly initialised)"
        ]
        for title, entries in (
            ("dropped", [f"{key}: {reason}" for key, reason in self.dropped.items()]),
            ("newly initialised", self.newly_initialised),
        ):
            shown = entries[:10]
            if len(entries) > len(shown):
                shown.append(f"... and {len(entries) - len(shown)} more")
            lines += [f"  {title}:"] * bool(entries) + [f"    {entry}" for entry in shown]
        return "\n".join(lines)


def load_compatible(
    model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]
) -> LoadReport:
    """Loads every entry whose name and shape fit the model and reports on the others.

    For a checkpoint with another number of classes, with or without auxiliary classifiers, or
    saved from a model within DistributedDataParallel or ``torch.compile`` (their prefixes are
    taken off).

    Args:
        model: any module.
        state_dict: names and tensors, or the path of a checkpoint: a state_dict saved by
            ``torch.save``, bare or as entry ``"model"`` or ``"state_dict"`` of a dict.

    Raises:
        TypeError: ``state_dict`` is neither.
        FileNotFoundError: no such file.
        RuntimeError: the file is broken (the message names it), or nothing fits the model. The
            model is then unchanged.
    """
    source = "the state_dict"
    if isinstance(state_dict, str | os.PathLike):
        source = f"the checkpoint {os.fspath(state_dict)}"
        state_dict = read_state_dict(state_dict)
    elif not isinstance(state_dict, Mapping):
        raise TypeError(
            "load_compatible() takes a state_dict or the path of a checkpoint as its second "
            f"argument but got a {_name(type(state_dict))}"
        )

    own = model.state_dict()
    fitting: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    for key, value in _without_prefixes(state_dict, own).items():
        if key not in own:
            dropped[key] = "not in the model"
        elif not isinstance(value, Tensor) or not isinstance(own[key], Tensor):
            dropped[key] = "not a tensor"
        elif value.shape != own[key].shape:
            dropped[key] = f"shape {list(value.shape)}, but {list(own[key].shape)} in the model"
        else:
            fitting[key] = value
    if not fitting:
        raise RuntimeError(f"{source} holds nothing that fits {_name(type(model))}")

    model.load_state_dict(fitting, strict=False)
    return LoadReport(list(fitting), dropped, [key for key in own if key not in fitting])


def _without_prefixes(state_dict: Mapping[str, Any], own: Iterable[str]) -> dict[str, Any]:
    """The state_dict with names as they were before DistributedDataParallel or torch.compile."""
    entries = dict(state_dict)
    for _ in range(2):  # one may be within the other
        for prefix in ("module.", "_orig_mod."):
            is_wrapped = all(key.startswith(prefix) for key in entries)
            if is_wrapped and not all(key.startswith(prefix) for key in own):
                entries = {key.removeprefix(prefix): value for key, value in entries.items()}
    return entries
