"""The op behind freeze() on the CPU: a chain of steps by a plan, and what it refuses."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import BLOCK_NOISE_FLOOR, assert_as_good_as_eager
from fast_path import randn, strides
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from inception_ext import _frozen, _frozen_cpu, _packing
from inception_ext._packing import LEAST_TILES, winograd_weight
from inception_ext._plan import CONVOLUTION, INCEPTION, POOL

ops = torch.ops.inception_ext

C, K, REDUCED, PROJECTION = 32, (16, 48, 32, 16), (32, 48), 16  # of the Inception module below


def convolution(k: int, c: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    weight = randn(k, c, size, size, seed=seed) / (c * size * size) ** 0.5
    return weight.contiguous(memory_format=torch.channels_last), randn(k, seed=seed + 50)


def arguments(dtype: torch.dtype, winograd: bool) -> dict[str, Any]:
    """Convolution 3x3 of stride 2, pool, convolution 3x3, Inception, pool: of 3 channels."""
    shapes = [(C, 3, 3), (C, C, 3), (K[0] + sum(REDUCED), C, 1), (K[1], REDUCED[0], 3)]
    shapes += [(K[2], REDUCED[1], 3), (K[3], C, 1)]
    pairs = [
        (weight.to(dtype), bias.to(dtype))
        for weight, bias in (convolution(*shape, seed=i) for i, shape in enumerate(shapes))
    ]
    fast = [winograd and size == 3 and c > 3 for _, c, size in shapes]
    weights = []
    for (weight, _), is_fast in zip(pairs, fast, strict=True):
        weights += [weight, winograd_weight(weight.float())] if is_fast else [weight]
    same, plain = [1, 1, 1, 1], [1, 1, 0, 0]
    # Fewer than where it pays: 33 x 47 images have 6 here, and both dtypes are to go that way.
    least_tiles = [4 if is_fast else 0 for is_fast in fast]
    plan = [
        *(CONVOLUTION, 2, 2, 1, 1, 0),
        *(POOL, 3, 3, 2, 2, 0, 0, 1),
        *(CONVOLUTION, *same, least_tiles[1]),
        *(INCEPTION, K[0], *REDUCED),
        *(CONVOLUTION, *plain, 0),
        *(CONVOLUTION, *same, least_tiles[3]),
        *(CONVOLUTION, *same, least_tiles[4]),
        *(POOL, 3, 3, 1, 1, 1, 1, 1),
        *(CONVOLUTION, *plain, 0),
        *(POOL, 2, 2, 2, 2, 0, 0, 0),
    ]
    return {
        "weights": weights,
        "biases": [bias for _, bias in pairs],
        "plan": plan,
        "images": 2,
        "pairs": pairs,
    }


def call(x: Tensor, given: dict[str, Any], **changes: Any) -> Tensor:
    values = {**given, **changes}
    return ops.frozen_forward(x, *(values[k] for k in ("weights", "biases", "plan", "images")))


def expected(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    def conv(x: Tensor, i: int, **kwargs: Any) -> Tensor:
        return F.conv2d(x, *(t.to(x.dtype) for t in pairs[i]), **kwargs).relu()

    x = F.max_pool2d(conv(x, 0, stride=2, padding=1), 3, 2, ceil_mode=True)
    x = conv(x, 1, padding=1)
    y1, y3, y5 = conv(x, 2).split([K[0], *REDUCED], 1)
    pooled = conv(F.max_pool2d(x, 3, 1, 1, ceil_mode=True), 5)
    x = torch.cat([y1, conv(y3, 3, padding=1), conv(y5, 4, padding=1), pooled], 1)
    return F.max_pool2d(x, 2)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("size", [(64, 64), (33, 47)], ids=["64x64", "33x47"])
@pytest.mark.parametrize(
    ("dtype", "winograd"),
    [(dtype, winograd) for dtype in (torch.float32, torch.bfloat16) for winograd in (True, False)],
    ids=["fp32 winograd", "fp32", "bf16 winograd", "bf16"],
)
def test_computes_the_chain(n, size, dtype, winograd):
    given = arguments(dtype, winograd)
    x = randn(n, 3, *size, seed=9, dtype=dtype)
    y = call(x, given)
    floor = BLOCK_NOISE_FLOOR if dtype == torch.float32 else None
    exact = expected(x.double(), given["pairs"])
    assert_as_good_as_eager(y, expected(x, given["pairs"]), exact, floor)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("winograd", [False, True])
def test_images_do_not_mix(winograd):
    """Whichever slice and thread an image is in; a NaN stays with its own."""
    given = arguments(torch.float32, winograd)
    x = randn(7, 3, 64, 64, seed=9)
    y = call(x, given)
    eager, exact = (expected(images, given["pairs"]) for images in (x, x.double()))
    for images in (1, 3, 100):
        assert_as_good_as_eager(call(x, given, images=images), eager, exact, BLOCK_NOISE_FLOOR)
    assert torch.equal(call(x, given), y)
    x[4, 1, 30, 30] = torch.nan
    poisoned = call(x, given)
    assert poisoned[4].isnan().any() and not poisoned[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(poisoned[others], y[others])


def test_x_stays_as_it_is():
    given = arguments(torch.float32, True)
    x = randn(3, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    call(x, given)
    assert torch.equal(x, before)
    # A chain that begins with a pool, or is nothing else, reads x itself too.
    y = call(x, {"weights": [], "biases": [], "plan": [POOL, 3, 3, 2, 2, 1, 1, 0], "images": 1})
    assert torch.equal(y, F.max_pool2d(before, 3, 2, 1)) and torch.equal(x, before)


def test_of_no_images():
    given = arguments(torch.float32, True)
    assert call(torch.zeros(0, 3, 64, 64), given).shape == (0, 112, 8, 8)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_fake_result_and_flops(n):
    given = arguments(torch.float32, True)
    x = randn(n, 3, 64, 48)
    tensors = (x, given["weights"], given["biases"])
    real = ops.frozen_forward(*tensors, given["plan"], 2)
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map(mode.from_tensor, tensors)
        fake = ops.frozen_forward(*fakes, given["plan"], 2)
    assert (fake.shape, fake.dtype, strides(fake)) == (real.shape, real.dtype, strides(real))
    with FlopCounterMode(display=False) as ours:
        call(x, given)
    with FlopCounterMode(display=False) as eager:
        expected(x, given["pairs"])
    assert ours.get_total_flops() == eager.get_total_flops()


def test_opcheck():
    given = arguments(torch.float32, True)
    values = (given["weights"], given["biases"], given["plan"], 2)
    torch.library.opcheck(ops.frozen_forward.default, (randn(2, 3, 32, 32), *values))


BAD = {
    "3D": (lambda v: v.update(x=v["x"][0]), "x: expected 4D input, got 3D"),
    "float64": (lambda v: v.update(x=v["x"].double()), "x: expected .*, got float64"),
    "channels": (lambda v: v.update(x=v["x"][:, :2]), "x: expected 3 channels, got 2"),
    "too small": (lambda v: v.update(x=v["x"][..., :3, :3]), "x: Output size is too small"),
    "images": (lambda v: v.update(images=0), "images: expected at least 1, got 0"),
    "no steps": (lambda v: v.update(plan=[]), "plan: expected at least one step, got none"),
    "kind": (lambda v: v["plan"].__setitem__(0, 9), "plan: expected 0, 1 or 2 .*, got 9"),
    "kind within": (lambda v: v["plan"].__setitem__(24, 1), "plan: expected a step of kind 0"),
    "cut": (lambda v: v["plan"].pop(), "plan: expected more than 63 values"),
    "stride": (lambda v: v["plan"].__setitem__(1, 0), "plan: expected 1 to .*, got 0"),
    "padding": (lambda v: v["plan"].__setitem__(3, -1), "plan: expected 0 to .*, got -1"),
    "overflow": (lambda v: v["plan"].__setitem__(3, 2**62), "plan: expected 0 to .*, got 4611"),
    "pool": (lambda v: v["plan"].__setitem__(11, 2), "padding: expected 0 to kernel_size / 2 = 1"),
    "parts": (lambda v: v["plan"].__setitem__(21, 7), "plan: expected parts of 96 channels"),
    "weights": (lambda v: v["weights"].pop(), "weights: expected more than 8 tensors"),
    "left over": (lambda v: v["weights"].append(v["weights"][0]), "plan: expected 10 weights"),
    "biases": (lambda v: v["biases"].pop(), "biases: expected more than 5 tensors"),
    "bias size": (
        lambda v: v["biases"].__setitem__(0, v["biases"][0][1:]),
        r"biases: expected shape \[32\], got \[31\]",
    ),
    "bias strides": (
        lambda v: v["biases"].__setitem__(0, v["biases"][0][:1].expand(32)),
        "biases: expected contiguous tensors",
    ),
    "weight dtype": (
        lambda v: v["weights"].__setitem__(0, v["weights"][0].bfloat16()),
        "weights: expected float32, got bfloat16",
    ),
    "winograd weight": (
        lambda v: v["weights"].__setitem__(2, v["weights"][2][1:]),
        r"weights: expected shape \[1152, 32, 1, 1\], got",
    ),
    "winograd window": (
        lambda v: v["plan"].__setitem__(5, 1),
        "plan: expected Winograd's weight for 3x3",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    spoil, message = BAD[name]
    values = {"x": randn(2, 3, 32, 32), **copy.copy(arguments(torch.float32, True))}
    spoil(values)
    with pytest.raises(RuntimeError, match=f"inception_ext::frozen_forward: {message}"):
        call(values.pop("x"), values)


def test_weight_transform():
    """Its sum over the positions, weighted as the output transform weights a constant, is exact."""
    weight = randn(5, 4, 3, 3, dtype=torch.float64)
    u = winograd_weight(weight).view(6, 6, 5, 4)
    assert torch.equal(u[0, 0], weight[:, :, 0, 0]) and torch.equal(u[5, 5], weight[:, :, 2, 2])
    a = 0.5**0.5
    column = torch.tensor([1, a, a * a], dtype=torch.float64) / -1.5
    torch.testing.assert_close(u[1, 1], torch.einsum("r,kcrs,s->kc", column, weight, column))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_winograd_weights_are_packed_for_images_that_use_them(dtype):
    """Once such an image has come; whatever came before, an image's result is the same."""
    least_tiles = LEAST_TILES[dtype]
    small = randn(2, C, 4, 4 * (least_tiles - 1), seed=1, dtype=dtype)
    large = randn(2, C, 4, 4 * least_tiles, seed=2, dtype=dtype)
    if not _frozen.has_fused_convolution(small):
        pytest.skip(f"no fused convolution of {dtype} on this CPU and torch")
    if dtype == torch.bfloat16 and _packing._has_bfloat16_tiles():
        pytest.skip("this CPU has AMX: bfloat16 does not go by Winograd")
    step = _frozen.Convolution(*convolution(K[1], C, 3, seed=0), (1, 1), (1, 1), dtype)

    def chain() -> _frozen_cpu._Chain:
        return _frozen_cpu._Chain([step], fused=True)

    def packed(chain: _frozen_cpu._Chain, x: torch.Tensor) -> int:
        return len(chain.plans.find(x, 2).weights)

    one = chain()
    y = one(small, 2)
    assert packed(one, small) == 1
    of_large = one(large, 2)
    assert packed(one, large) == 2
    assert torch.equal(one(small, 2), y) and packed(one, small) == 1
    another = chain()
    assert torch.equal(another(large, 2), of_large) and packed(another, large) == 2
    assert torch.equal(another(small, 2), y)


def plans_of(step) -> _frozen_cpu._Plans:
    return _frozen_cpu._Chain([step], fused=True).plans


def images(h, w, n=1):
    return torch.empty(n, C, h, w)


@pytest.fixture
def step():
    return _frozen.Convolution(*convolution(K[1], C, 3, seed=0), (1, 1), (1, 1), torch.float32)


def test_a_size_has_a_plan_of_its_own_when_it_comes_again(step):
    plans = plans_of(step)
    large = plans.find(images(40, 40), 1)
    larger = plans.find(images(50, 60), 1)  # nothing to borrow from
    assert larger is not large
    assert plans.find(images(30, 30), 1) is large  # of both that hold it, the smaller one
    assert plans.find(images(30, 50), 1) is larger
    own = plans.find(images(30, 30), 1)
    assert own not in (large, larger)
    assert plans.find(images(30, 30), 1) is own
    assert plans.find(images(20, 20), 1) is own
    assert plans.find(images(40, 40), 1) is large


def test_slices_of_other_sizes_have_plans_of_their_own(step):
    """Borrowed at first as well."""
    plans = plans_of(step)
    threads = torch.get_num_threads()
    one = plans.find(images(40, 40), 8)
    assert plans.find(images(40, 40, 4 * threads), 8) is one
    four = plans.find(images(40, 40, 4 * threads), 8)
    assert four is not one
    assert plans.find(images(40, 40, 5 * threads), 4) is four  # never more than four at once
    assert plans.find(images(40, 40), 8) is one


@pytest.mark.parametrize("sides", [range(40, 20, -1), range(20, 40)], ids=["down", "up"])
def test_so_many_sizes_that_plans_are_forgotten(step, monkeypatch, sides):
    monkeypatch.setattr(_frozen_cpu, "_MOST_SHAPES", 4)
    plans = plans_of(step)
    for side in sides:
        x = images(side, side)
        plans.find(x, 1)
        own = plans.find(x, 1)
        assert plans.find(x, 1) is own
        assert len(plans._by_shape) <= 4


def test_plans_from_several_threads(step, monkeypatch):
    """Sizes come and are forgotten meanwhile."""
    monkeypatch.setattr(_frozen_cpu, "_MOST_SHAPES", 3)
    plans = plans_of(step)
    xs = [randn(1, C, side, side, seed=side) for side in range(20, 28)]
    want = [_frozen_cpu._Chain([step], fused=True)(x, 1) for x in xs]
    chain = _frozen_cpu._Chain([step], fused=True)
    chain.plans = plans
    barrier = threading.Barrier(4)

    def work(i: int) -> bool:
        barrier.wait()
        order = [(5 * j + i) % len(xs) for j in range(40)]
        return all(torch.equal(chain(xs[k], 1), want[k]) for k in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    held = plans._weights._plain[step]
    for i, one in enumerate(held):
        assert not any(_packing._same_layout(one, other) for other in held[:i])


def test_where_torch_does_not_tell_layouts_apart(step, monkeypatch):
    """One does for all."""
    without = SimpleNamespace(**vars(_packing.torch))
    without.ops = SimpleNamespace(
        mkldnn=SimpleNamespace(
            _reorder_convolution_weight=torch.ops.mkldnn._reorder_convolution_weight
        )
    )
    monkeypatch.setattr(_packing, "torch", without)
    plans = plans_of(step)
    for side in (28, 7, 2):
        for _ in range(2):
            plans.find(images(side, side), 1)
    assert len(plans._weights._plain[step]) == 1


def test_weights_of_one_layout_are_held_once():
    """Where the packed bytes are equal; small images may want another layout."""
    step = _frozen.Convolution(*convolution(480, 832, 1, seed=0), (1, 1), (0, 0), torch.float32)
    plans = plans_of(step)
    weights = []
    for side in (28, 14, 27, 7, 2, 1):
        x = torch.empty(1, 832, side, side)
        plans.find(x, 1)
        weights += plans.find(x, 1).weights
    held = plans._weights._plain[step]
    assert {id(w) for w in weights} == {id(w) for w in held}
    assert len(held) < len(weights)
    for i, one in enumerate(held):
        assert not any(_packing._same_layout(one, other) for other in held[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_do_not_depend_on_sizes_that_came_before(dtype):
    """Not in a bit: weights in a layout for other images are brought to the one that is wanted."""
    step = _frozen.Convolution(*convolution(480, 832, 1, seed=0), (1, 1), (0, 0), dtype)
    xs = [randn(2, 832, side, side, seed=side, dtype=dtype) for side in (1, 2, 7, 28)]
    if not _frozen.has_fused_convolution(xs[0]):
        pytest.skip(f"no fused convolution of {dtype} on this CPU and torch")
    want = [_frozen_cpu._Chain([step], fused=True)(x, 2) for x in xs]
    chain = _frozen_cpu._Chain([step], fused=True)
    for x, y in [*zip(xs, want, strict=True)][::-1] * 2:
        assert torch.equal(chain(x, 2), y)
    assert len({id(chain.plans.find(x, 2)) for x in xs}) == len(xs)
