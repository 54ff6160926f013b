"""The inference ops: their plain twins, what torch is told about them, and max_pool_out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fast_path import ARRANGEMENTS, randn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from inception_ext import reference
from inception_ext.testing import emulated, emulator_error

needs_emulator = pytest.mark.skipif(
    emulator_error() is not None, reason=f"built without the emulator: {emulator_error()}"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """channels_last, full of NaN."""
    return torch.full(size, torch.nan, dtype=dtype).to(memory_format=torch.channels_last)


def group(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a conv_group of three problems: one split in three, one pooled, one 5x5."""
    x, z = (randn(2, c, 6, 5, seed=c).to(dtype) for c in (12, 8))
    x, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, z))
    weights = [randn(k, c, r, r, seed=k) for k, c, r in ((24, 12, 1), (16, 12, 1), (8, 8, 5))]
    concat = empty(2, 40, 6, 5, dtype=dtype)
    return {
        "x": [x, x, z],
        "weights": [reference.pack_weight(weight).to(dtype) for weight in weights],
        "biases": [randn(weight.shape[0], seed=7) for weight in weights],
        "kernel_sizes": [1, 1, 1, 1, 5, 5],
        "strides": [1] * 6,
        "paddings": [0, 0, 0, 0, 2, 2],
        "pools": [False, True, False],
        "relus": [True, True, False],
        "segments": [3, 1, 1],
        "exact": True,
        "workspace": None,
        "outputs": [
            concat[:, :8],
            *(empty(2, 8, 6, 5, dtype=dtype) for _ in range(2)),
            concat[:, 8:24],
            concat[:, 24:32],
        ],
    }


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Arguments of every op."""
    bias, wide = randn(64, seed=1), randn(192, seed=2)
    weight = reference.pack_weight(randn(64, 3, 7, 7)).to(dtype)
    weight1 = reference.pack_weight(randn(64, 64, 1, 1)).to(dtype)
    weight2 = reference.pack_weight(randn(192, 64, 3, 3)).to(dtype)
    x = randn(2, 64, 8, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    affine = ([2.0, 1.0, 0.5], [0.1, -0.2, 0.3])
    images = randn(2, 3, 15, 17)
    return {
        "conv_group": tuple(group(dtype).values()),
        "stem_conv_pool": (images, weight, bias, *affine, True, empty(2, 64, 4, 4, dtype=dtype)),
        "stem_conv_conv_pool": (
            *(x, weight1, bias, weight2, wide, True),
            empty(2, 192, 4, 3, dtype=dtype),
        ),
        "max_pool_out": (x, [3, 3], [2, 2], [0, 0], True, empty(2, 64, 4, 3, dtype=dtype)),
        "global_avg_pool": (x, empty(2, 64, 1, 1, dtype=dtype)),
        "lrn": (x, 5, 1e-4, 0.75, 1.0, empty(2, 64, 8, 7, dtype=dtype)),
    }


# The plain twins


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (4, 8, 1, 1), (3, 5, 3, 5)], ids=str)
def test_packed_weights(shape):
    weight = randn(*shape)
    packed = reference.pack_weight(weight)
    k, c, r, s = shape
    assert packed.shape == (k, -(-r * s * c // 8) * 8) and packed.is_contiguous()
    assert packed[1, (r - 1) * s * c + (s - 1) * c + c - 1] == weight[1, c - 1, r - 1, s - 1]
    assert (packed[:, r * s * c :] == 0).all()
    assert torch.equal(reference.unpack_weight(packed, c, (r, s)), weight)


def test_conv_group_is_its_convolutions():
    arguments = group()
    reference.conv_group(**arguments)
    x, _, z = arguments["x"]
    inputs = (x, F.max_pool2d(x, 3, 1, 1), z)
    expected = [
        F.conv2d(
            inputs[i],
            reference.unpack_weight(arguments["weights"][i], inputs[i].shape[1], (r, r)),
            arguments["biases"][i],
            padding=r // 2,
        )
        for i, r in enumerate((1, 1, 5))
    ]
    outputs = arguments["outputs"]
    for j, y in enumerate((*expected[0].relu().split(8, 1), expected[1].relu(), expected[2])):
        torch.testing.assert_close(outputs[j], y)
    assert outputs[0]._base[:, 32:].isnan().all()  # not asked for


@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32])
def test_stems_are_their_layers(image_dtype):
    images = (randn(2, 3, 33, 47) * 50 + 128).clamp(0, 255).to(image_dtype)
    scale, shift = [0.02, 0.03, 0.04], [-2.0, -1.0, 0.5]
    w1, w2, w3 = randn(64, 3, 7, 7), randn(64, 64, 1, 1, seed=1), randn(192, 64, 3, 3, seed=2)
    b1, b2, b3 = (randn(k, seed=k) for k in (64, 65, 192))
    b2 = b2[:64]
    x = images.float() * torch.tensor(scale).view(3, 1, 1) + torch.tensor(shift).view(3, 1, 1)
    expected = F.max_pool2d(F.conv2d(x, w1, b1, 2, 3).relu(), 3, 2, ceil_mode=True)
    y = empty(*expected.shape)
    reference.stem_conv_pool(images, reference.pack_weight(w1), b1, scale, shift, True, y)
    torch.testing.assert_close(y, expected)

    z = F.conv2d(F.conv2d(y, w2, b2).relu(), w3, b3, padding=1).relu()
    expected = F.max_pool2d(z, 3, 2, ceil_mode=True)
    out = empty(*expected.shape)
    packed = [reference.pack_weight(w) for w in (w2, w3)]
    reference.stem_conv_conv_pool(y, packed[0], b2, packed[1], b3, True, out)
    torch.testing.assert_close(out, expected)


def test_pools_and_normalisation():
    x = randn(2, 10, 7, 6)
    y = empty(2, 10, 1, 1)
    reference.global_avg_pool(x, y)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, 1))
    y = empty(2, 10, 7, 6)
    reference.lrn_out(x, 5, 0.1, 0.75, 2.0, y)
    torch.testing.assert_close(y, F.local_response_norm(x, 5, 0.1, 0.75, 2.0))
    y = empty(2, 10, 3, 3)
    reference.max_pool_out(x, [3, 2], [2, 2], [0, 0], False, y)
    torch.testing.assert_close(y, F.max_pool2d(x, (3, 2), 2))


# What torch is told


def test_schemas():
    ops = torch.ops.inception_ext
    for name in calls():
        schema = getattr(ops, name).default._schema
        assert schema.is_mutable and not schema.returns
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        assert written == (["workspace", "outputs"] if name == "conv_group" else ["y"])


def test_flops():
    ops = torch.ops.inception_ext
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for name, arguments in calls().items():
            getattr(ops, name)(*torch.utils._pytree.tree_map_only(Tensor, to_meta, arguments))
    counts = {
        str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()
    }
    assert counts == {
        "conv_group": 2 * 2 * 30 * (24 * 12 + 16 * 12 + 8 * 8 * 25),
        "stem_conv_pool": 2 * 2 * 8 * 9 * 64 * 3 * 49,
        "stem_conv_conv_pool": 2 * 2 * 8 * 7 * (64 * 64 + 192 * 64 * 9),
    }


def to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


@needs_emulator
@pytest.mark.parametrize("name", calls())
def test_opcheck(name):
    op = getattr(torch.ops.inception_ext_emulated, name).default
    torch.library.opcheck(op, calls()[name])


# max_pool_out


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_max_pool_out(dtype, arrangement):
    """Into a slice of a wider tensor, on emulated kernels and, where there are some, the CPU's."""
    x = ARRANGEMENTS[arrangement](randn(2, 10, 9, 7, dtype=dtype))
    expected = F.max_pool2d(x.float(), 3, 2, ceil_mode=True).to(dtype)
    namespaces = [torch.ops.inception_ext_emulated]
    if dtype != torch.float16:
        namespaces.append(torch.ops.inception_ext)
    for ops in namespaces:
        wide = empty(2, 16, 4, 3, dtype=dtype)
        ops.max_pool_out(x, [3, 3], [2, 2], [0, 0], True, wide[:, 3:13])
        assert torch.equal(wide[:, 3:13], expected)
        assert wide[:, :3].isnan().all() and wide[:, 13:].isnan().all()


@needs_emulator
def test_max_pool_out_allocates_and_launches_nothing_for_no_images():
    x, y = empty(0, 8, 6, 6), empty(0, 8, 3, 3)
    with emulated() as launches:
        torch.ops.inception_ext_emulated.max_pool_out(x, [2, 2], [2, 2], [0, 0], False, y)
    assert launches == []


@pytest.mark.parametrize(
    ("y", "text"),
    [
        (empty(2, 8, 3, 4), r"y: expected shape \[2, 8, 3, 3\], got \[2, 8, 3, 4\]"),
        (empty(2, 8, 3, 3).half(), "y: expected float32, got float16"),
        (torch.empty(2, 8, 3, 3), r"y: expected channels_last .* strides \[72, 9, 3, 1\]"),
        (empty(2, 8, 3, 4)[..., :3], r"y: expected channels_last .* strides \[96, 1, 32, 8\]"),
    ],
)
def test_max_pool_out_refuses(y, text):
    x = randn(2, 8, 6, 6)
    with pytest.raises(RuntimeError, match=f"inception_ext::max_pool_out: {text}"):
        torch.ops.inception_ext.max_pool_out(x, [2, 2], [2, 2], [0, 0], False, y)
