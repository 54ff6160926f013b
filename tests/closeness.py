"""The tolerances of the tests: as good as PyTorch in the same dtype.

Errors are those against a float64 reference, relative to the size of the reference. Ours may be
twice that of eager PyTorch, plus a noise floor: two correct computations differ in the order of
their sums, and where eager happens to be exact, twice its error leaves no room for that.

:func:`assert_as_good_as_eager` looks at the worst element. It is for ops, where the noise floor is
a few units in the last place, and for float32 blocks, where :data:`BLOCK_NOISE_FLOOR` is in place:
batch norm and sums that cancel magnify rounding errors, and between memory formats, or images that
differ in the last place, eager torchvision's own errors vary by up to 40 eps beyond a factor of 2.

A whole network in training is no smooth thing: a rounding error that decides a ReLU or a max pool
moves gradients by per cents. Measured on eager torchvision in the same way: root-mean-square errors
of gradients from 0.0002 to 0.04 in float32, of outputs from 3e-6 to 4e-5.
:func:`assert_network_as_good_as_eager` takes root-mean-square errors with floors above those, so it
tells wrong from right, not good from better. bfloat16 blocks, whose rounding errors decide as many
ReLUs, go by it too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

NOISE_FLOOR_EPS = 4  # of ops, in units of the dtype's eps
BLOCK_NOISE_FLOOR = 64 * torch.finfo(torch.float32).eps
NETWORK_NOISE_FLOOR = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.02,
    torch.bfloat16: 0.05,
}
NETWORK_GRADIENT_NOISE_FLOOR = 0.1  # in the dtypes below float64
NETWORK_TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # of float32 outputs, for assert_close
NEGLIGIBLE = 1e-3  # gradients that are 0 but for rounding are measured by this much of the largest


def assert_as_good_as_eager(
    ours: Tensor,
    eager: Tensor,
    reference: Tensor,
    noise_floor: float | None = None,
    name: str = "result",
) -> None:
    """Fails where an element of ours is further from the reference than the rule above allows.

    Args:
        ours: the result to judge.
        eager: the same in plain PyTorch; ours must have its shape, dtype, and NaN and infinities.
        reference: the same in float64; errors are relative to its largest absolute value.
        noise_floor: default ``NOISE_FLOOR_EPS`` times the dtype's eps.
        name: what to call it in the message.
    """
    finite = _assert_alike(ours, eager, reference, name)
    if finite is None:
        return
    scale = reference[finite].abs().max().item() or 1.0
    if noise_floor is None:
        noise_floor = NOISE_FLOOR_EPS * torch.finfo(ours.dtype).eps
    errors = [(x.double() - reference)[finite].abs().max().item() / scale for x in (ours, eager)]
    _assert_within(*errors, noise_floor, name)


def assert_all_as_good_as_eager(
    ours: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    noise_floor: float | None = None,
) -> None:
    """:func:`assert_as_good_as_eager` for each entry; all three must have the same names."""
    assert ours.keys() == eager.keys() == reference.keys()
    for name in eager:
        assert_as_good_as_eager(ours[name], eager[name], reference[name], noise_floor, name)


def assert_network_as_good_as_eager(
    ours: Mapping[str, Tensor], eager: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """The same for what a whole network computes, by root-mean-square error, with higher floors.

    Entries whose name ends in ``.grad`` are gradients.
    """
    assert ours.keys() == eager.keys() == reference.keys()
    largest = max((_rms(x) for k, x in reference.items() if k.endswith(".grad")), default=0.0)
    for name in eager:
        finite = _assert_alike(ours[name], eager[name], reference[name], name)
        if finite is None:
            continue
        noise_floor = NETWORK_NOISE_FLOOR[ours[name].dtype]
        scale = _rms(reference[name][finite])
        if name.endswith(".grad"):
            scale = max(scale, NEGLIGIBLE * largest)
            if ours[name].dtype != torch.float64:
                noise_floor = NETWORK_GRADIENT_NOISE_FLOOR
        errors = [
            _rms((x[name].double() - reference[name])[finite]) / (scale or 1.0)
            for x in (ours, eager)
        ]
        _assert_within(*errors, noise_floor, name)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _assert_alike(ours: Tensor, eager: Tensor, reference: Tensor, name: str) -> Tensor | None:
    """Checks all but the finite values; returns the mask of those, or None where none are left."""
    assert ours.shape == eager.shape == reference.shape, f"{name}: {ours.shape}, {eager.shape}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, but eager gives {eager.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, eager), f"{name}: differs from eager"
        return None
    finite = eager.isfinite()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(eager)), f"{name}: other NaN or infinities than eager"
    return finite if finite.any() else None


def _assert_within(ours: float, eager: float, noise_floor: float, name: str) -> None:
    allowed = 2 * eager + noise_floor
    assert ours <= allowed, (
        f"{name}: error {ours:.3g} against float64, eager has {eager:.3g}, allowed {allowed:.3g}"
    )
