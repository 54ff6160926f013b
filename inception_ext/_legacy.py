"""The calling conventions of torchvision before 0.13, with the warnings that torchvision gives."""

import functools
import inspect
import os
import warnings
from collections.abc import Callable
from enum import Enum
from typing import Any, TypeVar

__all__ = ["legacy_weights_interface"]

T = TypeVar("T")


def legacy_weights_interface(default: Enum) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Lets a builder with a keyword ``weights`` be called in the old ways, each with a warning.

    - ``build(weights, progress)``: keyword-only parameters given by position.
    - ``build(pretrained=True)`` and ``build(True)``: mean ``weights=default``; False means None.

    Args:
        default: the weights that ``pretrained=True`` stands for.
    """

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        names = [
            name
            for name, parameter in inspect.signature(build).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]

        @functools.wraps(build)
        def wrapper(*args: Any, **kwargs: Any) -> T:
            if len(args) > len(names):
                raise TypeError(
                    f"{build.__name__}() takes at most {len(names)} positional arguments "
                    f"({', '.join(names)}) but {len(args)} were given"
                )
            if args:
                positional = dict(zip(names, args, strict=False))
                quoted = " and ".join(f"'{name}'" for name in positional)
                warnings.warn(
                    f"Using {quoted} as positional parameter(s) is deprecated since 0.13 and may "
                    "be removed in the future. Please use keyword parameter(s) instead.",
                    stacklevel=2,
                )
                kwargs.update(positional)
            _replace_pretrained(kwargs, default)
            return build(**kwargs)

        return wrapper

    return decorate


def _replace_pretrained(kwargs: dict[str, Any], default: Enum) -> None:
    """Turns ``pretrained``, or a ``weights`` that can only be meant as it, into ``weights``."""
    if "weights" in kwargs:
        weights = kwargs["weights"]
        is_new_style = weights is None or isinstance(weights, Enum | str | os.PathLike)
        if is_new_style and weights != "legacy":
            return
        pretrained = kwargs.pop("weights")
        kwargs.pop("pretrained", None)
    elif "pretrained" in kwargs:
        pretrained = kwargs.pop("pretrained")
        warnings.warn(
            "The parameter 'pretrained' is deprecated since 0.13 and may be removed in the future, "
            "please use 'weights' instead.",
            stacklevel=3,
        )
    else:
        return

    weights = default if pretrained else None
    message = (
        "Arguments other than a weight enum or `None` for 'weights' are deprecated since 0.13 and "
        "may be removed in the future. "
        f"The current behavior is equivalent to passing `weights={weights}`."
    )
    if pretrained:
        message += (
            f" You can also use `weights={type(weights).__name__}.DEFAULT` "
            "to get the most up-to-date weights."
        )
    warnings.warn(message, stacklevel=3)
    kwargs["weights"] = weights
