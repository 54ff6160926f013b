"""Inception modules of any widths, folded, on the CUDA kernels."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_as_good_as_eager
from engine_cases import to_device
from fast_path import ARRANGEMENTS, randn
from kernel_devices import each_device, kernels_on, needs_emulator, torch_device
from torch import Tensor, nn

import inception_ext
from inception_ext import functional, reference
from inception_ext.engine import fold_inception
from inception_ext.modules import Inception
from inception_ext.testing import emulated

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """float32 as on the CPU, which the errors are held against."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def block_of(widths: tuple[int, ...], size: int = 3, conv_block: Any = None) -> Inception:
    torch.manual_seed(1)
    block = Inception(*widths, branch3_kernel_size=size, conv_block=conv_block).eval()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return block


def run_folded(folded: Any, x: Tensor, device: str) -> tuple[Tensor, list[Any]]:
    parameters = [
        [t.to(torch_device(device)) for t in part] if isinstance(part[0], Tensor) else part
        for part in folded[:3]
    ]
    given = to_device(x, device)
    with kernels_on(device) as launches, torch.no_grad():
        y = functional.folded_inception(given, *parameters, folded[3])
    return y.cpu(), launches


def googlenets_modules() -> dict[str, tuple[int, ...]]:
    """Inputs, widths, and height and width for images of 224 x 224, by name."""
    sides = {"3": 28, "4": 14, "5": 7}
    found = {}
    model = inception_ext.GoogLeNet(10, aux_logits=False, init_weights=False)
    for name, block in model.named_children():
        if isinstance(block, Inception):
            convs: list[Any] = [block.branch1, *block.branch2, *block.branch3, block.branch4[1]]
            widths = [conv.conv.out_channels for conv in convs]
            found[name] = (convs[0].conv.in_channels, *widths, sides[name[9]])
    return found


GOOGLENET = googlenets_modules()


@each_device
@pytest.mark.parametrize("name", GOOGLENET)
def test_the_nine_modules(device, name):
    """Each at its own size, against float64; the dtypes and the size of branch 3 take turns."""
    *widths, side = GOOGLENET[name]
    i = list(GOOGLENET).index(name)
    dtype, size = DTYPES[i % 3 if i % 3 else 1 + i % 2], (3, 5)[i % 2]
    check_block(block_of(tuple(widths), size), randn(1, widths[0], side, side), dtype, device)


@each_device
@each_dtype
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(
    "widths", [(17, 5, 3, 7, 1, 4, 6), (24, 16, 8, 24, 8, 16, 8), (8, 1, 1, 1, 1, 1, 1)], ids=str
)
def test_modules_of_any_widths(device, dtype, size, widths):
    for shape in ((2, 9, 7), (1, 1, 1), (3, 1, 5)):
        n, h, w = shape
        check_block(block_of(widths, size), randn(n, widths[0], h, w, seed=h), dtype, device)


def check_block(block: Inception, x: Tensor, dtype: torch.dtype, device: str) -> None:
    y, launches = run_folded(fold_inception(block, dtype), x.to(dtype), device)
    assert len(launches) == (2 if device == "emulator" else 0)
    with torch.no_grad(), functional.use_kernels(False):
        eager = copy.deepcopy(block).to(dtype)(x.to(dtype))
        expected = block.double()(x.to(dtype).double())
    assert_as_good_as_eager(y, eager, expected)


@each_device
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_modules_on_any_strides(device, arrangement):
    folded = fold_inception(block_of((17, 5, 3, 7, 1, 4, 6)), torch.float16)
    x = randn(2, 17, 6, 5).half()
    expected, _ = run_folded(folded, x, device)
    assert torch.equal(run_folded(folded, ARRANGEMENTS[arrangement](x), device)[0], expected)


@each_device
def test_modules_of_no_images(device):
    folded = fold_inception(block_of((17, 5, 3, 7, 1, 4, 6)), torch.float16)
    y, launches = run_folded(folded, randn(0, 17, 6, 5).half(), device)
    assert y.shape == (0, 22, 6, 5) and launches == []


@each_device
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_modules_compile_with_fullgraph(device, backend):
    folded = fold_inception(block_of((24, 16, 8, 24, 8, 16, 8)), torch.float16)
    x = randn(2, 24, 5, 6).half()
    expected, _ = run_folded(folded, x, device)
    moved = [
        [to_device(t, device) for t in part] if isinstance(part[0], Tensor) else part
        for part in folded[:3]
    ]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: functional.folded_inception(x, *moved) * 2, fullgraph=True, backend=backend
    )
    with kernels_on(device), torch.no_grad():
        assert torch.equal(compiled(to_device(x, device)).cpu(), expected * 2)
    torch.compiler.reset()


@needs_emulator
def test_modules_leave_the_kernels_for_a_gradient():
    folded = fold_inception(block_of((17, 5, 3, 7, 1, 4, 6)))
    x = randn(1, 17, 4, 4).requires_grad_()
    with emulated() as launches:
        y = functional.folded_inception(x, *folded)
    y.sum().backward()
    assert launches == [] and x.grad is not None
    torch.testing.assert_close(y, reference.folded_inception(x, *folded))


def test_folding_refuses_what_it_does_not_know():
    block = block_of((17, 5, 3, 7, 1, 4, 6))
    block.branch1.register_forward_hook(lambda *_: None)
    for module in (block, nn.Conv2d(3, 3, 1)):
        with pytest.raises(TypeError, match="fold_inception: block: expected an Inception"):
            fold_inception(module)
