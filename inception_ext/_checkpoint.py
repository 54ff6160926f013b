"""Reading checkpoints: whatever is wrong with one, the error names the file."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_strict", "read_content", "read_state_dict", "state_dict_in"]


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state_dict in a file saved by ``torch.save``, on the CPU.

    It may be the object saved, or its entry ``"model"`` or ``"state_dict"``. Only tensors and
    plain containers are unpickled (``weights_only``).

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file is truncated, is no checkpoint, or holds no state_dict.
    """
    return state_dict_in(read_content(path), os.fspath(path))


def read_content(path: str | os.PathLike[str]) -> Any:
    """Whatever a file saved by ``torch.save`` holds; errors as in :func:`read_state_dict`."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no checkpoint at {name}")
    try:
        return torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle may raise anything at all
        what = str(error) or type(error).__name__
        raise RuntimeError(f"cannot read the checkpoint {name}: {what}") from error


def state_dict_in(content: Any, name: str) -> dict[str, Tensor]:
    """The state_dict in what a file holds, see :func:`read_state_dict`.

    Raises:
        RuntimeError: there is none; the message names the file.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(map(torch.is_tensor, content.values())):
        raise RuntimeError(
            f"the checkpoint {name} should hold a state_dict but holds a {type(content).__name__}"
            + (" without tensors" if isinstance(content, Mapping) else "")
        )
    return dict(content)


def load_strict(model: nn.Module, state_dict: Mapping[str, Tensor], path: str) -> None:
    """``model.load_state_dict`` with the file in the error.

    Raises:
        RuntimeError: names or shapes do not match; the model may then be half loaded.
    """
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise RuntimeError(f"the checkpoint {path} does not fit: {error}") from error
