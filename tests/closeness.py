"""The one tolerance of the tests: as good as PyTorch in the same dtype.

Errors are those against a float64 reference, as the largest absolute difference divided by the
largest absolute value of the reference. Ours may be twice that of eager PyTorch, plus a noise
floor: two correct computations differ in the order of their sums, and where eager happens to be
exact, twice its error leaves no room for that.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

NOISE_FLOOR_EPS = 4  # the default noise floor, in units of the dtype's eps


def assert_as_good_as_eager(
    ours: Tensor,
    eager: Tensor,
    reference: Tensor,
    noise_floor: float | None = None,
    name: str = "result",
) -> None:
    """Fails where ours is further from the reference than the rule above allows.

    Args:
        ours: the result to judge.
        eager: the same in plain PyTorch; ours must have its shape, dtype, and NaN and infinities.
        reference: the same in float64.
        noise_floor: default ``NOISE_FLOOR_EPS`` times the dtype's eps.
        name: what to call it in the message.
    """
    assert ours.shape == eager.shape == reference.shape, f"{name}: {ours.shape}, {eager.shape}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, but eager gives {eager.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, eager), f"{name}: differs from eager"
        return
    finite = eager.isfinite()
    assert torch.equal(
        ours[~finite].double().nan_to_num(nan=0.5), eager[~finite].double().nan_to_num(nan=0.5)
    ), f"{name}: other NaN or infinities than eager"
    if not finite.any():
        return

    scale = reference[finite].abs().max().item() or 1.0

    def error(x: Tensor) -> float:
        return (x.double() - reference)[finite].abs().max().item() / scale

    if noise_floor is None:
        noise_floor = NOISE_FLOOR_EPS * torch.finfo(ours.dtype).eps
    allowed = 2 * error(eager) + noise_floor
    assert error(ours) <= allowed, (
        f"{name}: error {error(ours):.3g} against float64, eager has {error(eager):.3g}, "
        f"allowed are {allowed:.3g}"
    )


def assert_all_as_good_as_eager(
    ours: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    noise_floor: float | None = None,
) -> None:
    """The same for each entry; all three must have the same names."""
    assert ours.keys() == eager.keys() == reference.keys()
    for name in eager:
        assert_as_good_as_eager(ours[name], eager[name], reference[name], noise_floor, name)
