"""Layers without weights on the CUDA kernels, lrn and aux_pool: what is true of both."""

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, assert_as_good_as_eager
from fast_path import randn
from kernel_devices import each_device, kernel_ops, kernels_on, needs_emulator, torch_device
from torch import Tensor, nn
from torch.func import vmap
from weightless_cases import ADAPTIVE, STRONG, WINDOW, Layer

from inception_ext import _layers, functional
from inception_ext.functional import use_kernels
from inception_ext.testing import emulated

LAYERS: dict[str, Layer] = {
    "lrn": lambda x: functional.lrn(x, *STRONG),
    "aux_pool": functional.aux_pool,
    "aux_pool of the paper": lambda x: functional.aux_pool(x, 4, 3, 1),
}
OPS = {
    "lrn": ["lrn", "lrn_backward"],
    "aux_pool": ["aux_pool_forward", "aux_pool_backward"],
    "aux_pool of the paper": ["aux_pool_forward", "aux_pool_backward"],
}

each_layer = pytest.mark.parametrize("name", LAYERS)


def image(seed: int = 0) -> Tensor:
    return randn(2, 8, 6, 7, seed=seed)


@each_device
@each_layer
@pytest.mark.parametrize("shape", [(0, 16, 6, 6), (2, 0, 6, 6)], ids=str)
def test_nothing_to_do(device, shape, name):
    x = torch.empty(shape, requires_grad=True, device=torch_device(device))
    with kernels_on(device) as launches:
        y = LAYERS[name](x)
        y.sum().backward()
    assert launches == [] and y.shape[:2] == shape[:2]
    assert x.grad is not None and x.grad.shape == x.shape


@needs_emulator
@each_layer
def test_inference_saves_nothing(name):
    """And gives the same."""
    leaf = image().requires_grad_()
    with emulated() as launches:
        y = LAYERS[name](leaf)
        with torch.no_grad():
            without = LAYERS[name](leaf)
        of_constant = LAYERS[name](image())
    assert y.requires_grad and not without.requires_grad and not of_constant.requires_grad
    assert torch.equal(y, without) and torch.equal(y, of_constant)
    assert [launch["op"] for launch in launches] == [OPS[name][0]] * 3


@needs_emulator
@each_layer
def test_double_backward_takes_the_reference(name):
    def penalty(dtype: torch.dtype = torch.float32) -> Tensor:
        x = image().to(dtype).requires_grad_()
        y = LAYERS[name](x)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with emulated() as launches:
        ours = penalty()
    with use_kernels(False):
        eager = penalty()
    assert_as_good_as_eager(ours, eager, penalty(torch.float64), BLOCK_NOISE_FLOOR)
    assert OPS[name][0] in {launch["op"] for launch in launches}


@needs_emulator
@each_layer
@pytest.mark.filterwarnings("error:There is a performance drop")  # of ops without batching rules
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap"])
def test_batched_gradients(how, name):
    """Several backward passes over one forward pass at once."""

    def gradients(dtype: torch.dtype = torch.float32) -> Tensor:
        x = image().to(dtype).requires_grad_()
        y = LAYERS[name](x)
        many = randn(3, *y.shape, seed=4, dtype=dtype)
        if how == "vmap":
            return vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])(many)
        return torch.autograd.grad(y, x, many, is_grads_batched=True)[0]

    with emulated() as launches:
        ours = gradients()
    with use_kernels(False):
        eager = gradients()
    assert_as_good_as_eager(ours, eager, gradients(torch.float64))
    assert [launch["op"] for launch in launches] == OPS[name][:1]


@needs_emulator
@each_layer
def test_two_backward_passes_and_accumulation(name):
    x = image().requires_grad_()
    with emulated(counting=False):
        y = LAYERS[name](x).square().sum()
        y.backward(retain_graph=True)
        first = x.grad.clone()
        y.backward()
    assert torch.equal(x.grad, 2 * first)


@needs_emulator
@each_layer
def test_compiled_with_fullgraph(name):
    x = image().requires_grad_()
    with emulated() as launches:
        y = torch.compile(lambda x: LAYERS[name](x).square(), fullgraph=True, backend="aot_eager")(
            x
        )
        y.sum().backward()
    torch.compiler.reset()
    assert [launch["op"] for launch in launches] == OPS[name]
    with emulated(counting=False):
        other = image().requires_grad_()
        expected = LAYERS[name](other).square()
        expected.sum().backward()
    assert torch.equal(y, expected) and torch.equal(x.grad, other.grad)


@needs_emulator
def test_opcheck():
    ops = kernel_ops("emulator")
    x = image()
    for op, arguments in (
        (ops.lrn, (x, *WINDOW, x.to(memory_format=torch.channels_last))),
        (ops.lrn_backward, (x, image(1), *WINDOW)),
        (ops.aux_pool_forward, (x, *ADAPTIVE)),
        (ops.aux_pool_forward, (x, 2, 3, 2)),
        (ops.aux_pool_backward, (randn(2, 8, 4, 4), [6, 7], 0, 1)),
        (ops.aux_pool_backward, (randn(2, 8, 4, 4), [6, 7], 3, 1)),
    ):
        torch.library.opcheck(op.default, arguments)


@needs_emulator
@each_layer
def test_names_in_profiles(name):
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        emulated(),
    ):
        LAYERS[name](image().requires_grad_()).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert {f"inception_ext_emulated::{op}" for op in OPS[name]} <= names


@needs_emulator
def test_bad_arguments():
    ops = kernel_ops("emulator")
    x, y = torch.zeros(2, 8, 6, 6), torch.zeros(2, 8, 4, 4)
    for call, message in [
        (lambda: ops.lrn_backward(x, x[0], *WINDOW), "lrn_backward: x: expected 4D input, got 3D"),
        (lambda: ops.lrn_backward(x, x.int(), *WINDOW), "backward: x: expected .*, got int32"),
        (lambda: ops.lrn_backward(y, x, *WINDOW), r"grad: expected shape \[2, 8, 6, 6\], got"),
        (lambda: ops.lrn_backward(x.half(), x, *WINDOW), "grad: expected float32, got float16"),
        (lambda: ops.lrn_backward(x, x, 0, 1.0, 1.0, 1.0), "size: expected 1 to .*, got 0"),
        (lambda: ops.aux_pool_forward(x[0], 4, 0, 1), "pool_forward: x: expected 4D input, got 3D"),
        (lambda: ops.aux_pool_forward(x.double(), 4, 0, 1), "x: expected .*, got float64"),
        (lambda: ops.aux_pool_forward(x[:, :, :0], 4, 0, 1), "x: expected at least one pixel"),
        (lambda: ops.aux_pool_forward(x, 0, 0, 1), "output_size: expected at least 1, got 0"),
        (lambda: ops.aux_pool_forward(x, 2**40, 0, 1), "x: expected .* input times output pixels"),
        (lambda: ops.aux_pool_forward(x, 4, -1, 1), "kernel_size: expected 1 to .*, got -1"),
        (lambda: ops.aux_pool_forward(x, 4, 5, 0), "stride: expected 1 to .*, got 0"),
        (
            lambda: ops.aux_pool_forward(x, 4, 5, 3),
            "x: expected at least 14 pixels for 4 windows of 5 with stride 3, got 6",
        ),
        (lambda: ops.aux_pool_backward(y[0], [6, 6], 0, 1), "grad: expected 4D input, got 3D"),
        (lambda: ops.aux_pool_backward(y.int(), [6, 6], 0, 1), "grad: expected .*, got int32"),
        (lambda: ops.aux_pool_backward(y, [6, 0], 0, 1), "input_size: expected at least one pixel"),
        (lambda: ops.aux_pool_backward(y, [13, 14], 5, 3), "input_size: expected at least 14 pix"),
        (lambda: ops.aux_pool_backward(y, [6, 6], -1, 1), "kernel_size: expected 1 to"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


# The gate


def run(layer: Layer, x: Tensor) -> list[str]:
    """The ops that forward and backward launch."""
    with emulated() as launches:
        y = layer(x)
        if y.requires_grad:
            y.sum().backward()
    return [launch["op"] for launch in launches]


@needs_emulator
@each_layer
def test_what_has_no_kernel_goes_the_reference_way(name):
    layer = LAYERS[name]
    assert run(layer, image().requires_grad_()) == OPS[name]
    assert run(layer, image().double().requires_grad_()) == []
    assert run(layer, image().as_subclass(type("Mine", (Tensor,), {})).requires_grad_()) == []
    assert run(vmap(layer), image()[None]) == []
    assert run(torch.func.grad(lambda x: layer(x).sum()), image()) == []
    with use_kernels(False):
        assert run(layer, image().requires_grad_()) == []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert run(layer, image().requires_grad_()) == []
    finally:
        handle.remove()
    x = image().requires_grad_()
    torch.testing.assert_close(layer(x), LAYERS[name](x))  # on the CPU, outside of the emulator


@needs_emulator
def test_windows_that_the_reference_words_the_error_for():
    with emulated() as launches:
        with pytest.raises(RuntimeError):
            functional.lrn(image(), 0)
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            functional.lrn(image()[0, 0], 5)
        assert functional.aux_pool(image(), 2, 3, 2).shape == (2, 8, 2, 2)
    assert [launch["op"] for launch in launches] == ["aux_pool_forward"]


class Twice(nn.LocalResponseNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, inputs, output: 3 * output)
    return norm


@needs_emulator
@pytest.mark.parametrize(
    ("norm", "fused"),
    [
        (nn.LocalResponseNorm(5, 2.0), True),
        (nn.LocalResponseNorm(4, 2.0), True),
        (nn.LocalResponseNorm(5, torch.tensor(2.0)), False),
        (hooked(nn.LocalResponseNorm(5, 2.0)), False),
        (Twice(5, 2.0), False),
        (nn.Identity(), False),
    ],
    ids=["plain", "even", "tensor", "hooked", "subclass", "replaced"],
)
def test_modules_that_a_kernel_may_stand_in_for(norm, fused):
    x = image().requires_grad_()
    assert run(lambda x: _layers.lrn(norm, x), x) == (OPS["lrn"] if fused else [])
    with emulated(counting=False):
        y = _layers.lrn(norm, x)
    assert_as_good_as_eager(y, norm(x), norm(x.double()))


@needs_emulator
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_layer
def test_autocast(name, dtype):
    """The same dtypes as the reference, which raises a power to in float32."""
    x = image().to(dtype)
    with torch.autocast("cpu", dtype):
        with emulated() as launches:
            leaf = x.clone().requires_grad_()
            y = LAYERS[name](leaf)
        with use_kernels(False):
            expected = LAYERS[name](x)
    with emulated(counting=False):
        y.sum().backward()
    assert y.dtype == expected.dtype and leaf.grad is not None and leaf.grad.dtype == dtype
    assert [launch["op"] for launch in launches] == OPS[name][:1]
    assert_as_good_as_eager(y, expected, LAYERS[name](x.double()))
