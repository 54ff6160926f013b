"""Mixed precision on the CUDA kernels: autocast over float32 master weights, and GradScaler."""

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from closeness import NOISE_FLOOR_EPS, assert_all_as_good_as_eager
from fast_path import randn
from kernel_devices import each_device, exact_products, kernels_on, needs_emulator, torch_device
from torch import Tensor, nn
from training_cases import (
    CASES,
    Chain,
    assert_equal,
    decided,
    each_case,
    gradients,
    leaf_of,
    output_gradient,
    results_of,
    small_googlenet,
    step,
)

from inception_ext import GoogLeNetLoss, functional
from inception_ext.modules import BasicConv2d
from inception_ext.testing import emulated

AMP = [torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", AMP, ids=["fp16", "bf16"])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


def autocast(device: str, dtype: torch.dtype, **kwargs: bool) -> torch.autocast:
    return torch.autocast(torch_device(device), dtype, **kwargs)


def amp_results(module: nn.Module, x: Tensor, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward under autocast, backward outside, as PyTorch advises."""
    leaf = leaf_of(x)
    with autocast(device, dtype):
        y = module(leaf)
    y.backward(output_gradient(y))
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad} | gradients(module) | dict(module.named_buffers())


@each_device
@each_case
@each_dtype
def test_master_weights(device, case, dtype):
    """As good as eager under autocast, in its dtypes: weights and their gradients are float32."""
    module, x = decided(case.module()).to(torch_device(device)), case.x(device, dtype)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    with kernels_on(device) as launches:
        ours = amp_results(module, x, device, dtype)
    with functional.use_kernels(False):
        eager = amp_results(plain, x, device, dtype)
        reference = results_of(exact, x.double())
    if device == "emulator":
        assert {f"{case.op}_forward", f"{case.op}_backward"} == {n["op"] for n in launches}
    assert ours["y"].dtype == ours["dx"].dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients(module).values())
    assert all(p.dtype == torch.float32 for p in module.parameters())
    floor = NOISE_FLOOR_EPS * torch.finfo(dtype).eps
    assert_all_as_good_as_eager(
        *({k: v.cpu() for k, v in found.items()} for found in (ours, eager, reference)), floor
    )


@needs_emulator
@each_dtype
def test_float32_images_reach_the_stem(dtype):
    """conv1 casts them as autocast casts a convolution's input."""
    torch.manual_seed(0)
    module = nn.Sequential(BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3))
    chain, x = Chain(), randn(2, 16, 9, 9)
    with emulated() as launches, torch.autocast("cpu", dtype):
        y = module(randn(2, 3, 20, 20))
        z = chain(x.requires_grad_())
    assert y.dtype == z.dtype == dtype
    assert {launch["op"] for launch in launches} == {"conv_chain_forward"}
    with emulated(counting=False):
        z.sum().backward()
        with torch.autocast("cpu", dtype):
            assert torch.equal(chain(x.to(dtype)), z)
    assert x.grad is not None and x.grad.dtype == torch.float32


@needs_emulator
@each_dtype
def test_the_network_is_as_fused_as_in_one_dtype(dtype):
    model, images = small_googlenet(), randn(4, 3, 32, 32)
    ops = []
    for enabled in (True, False):
        with emulated(checks=False) as launches:
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = GoogLeNetLoss()(model(images), torch.arange(4))
            loss.backward()
        ops.append(Counter(launch["op"] for launch in launches))
    assert ops[0].keys() == ops[1].keys()
    of_modules = [{op: n for op, n in found.items() if "inception" in op} for found in ops]
    assert of_modules[0] == of_modules[1]
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# Where autocast begins and ends


@each_device
@each_case
@each_dtype
def test_backward_within_autocast(device, case, dtype):
    """Which PyTorch advises against, but allows."""
    inside, outside, x = case.module(device), case.module(device), case.x(device, dtype)
    with kernels_on(device, counting=False):
        expected = amp_results(outside, x, device, dtype)
        with autocast(device, dtype):
            ours = step(inside, x)
    assert_equal(ours | gradients(inside) | dict(inside.named_buffers()), expected)


@each_device
@each_case
@each_dtype
def test_autocast_that_is_off_within(device, case, dtype):
    module, x = case.module(device), case.x(device)
    with kernels_on(device, counting=False):
        expected = results_of(case.module(device), x)
        with autocast(device, dtype), autocast(device, dtype, enabled=False):
            ours = results_of(module, x)
    assert_equal(ours, expected)


@each_device
@each_dtype
def test_autocast_around_one_module(device, dtype):
    """The next one works on, in float32, from a 16-bit activation that somebody casts back."""
    first, second = CASES["inception"].module(device), CASES["conv"].module(device)
    x = CASES["inception"].x(device, dtype)
    second = nn.Sequential(nn.Conv2d(40, 16, 1, device=x.device), second)

    def run() -> dict[str, Tensor]:
        leaf = leaf_of(x)
        with autocast(device, dtype):
            y = first(leaf)
        z = second(y.float())
        z.square().sum().backward()
        return {"y": y.detach(), "z": z.detach(), "dx": leaf.grad}

    with kernels_on(device, counting=False):
        found = run()
    assert [t.dtype for t in found.values()] == [dtype, torch.float32, dtype]
    with functional.use_kernels(False):
        eager = run()
    tolerance = 16 * torch.finfo(dtype).eps
    for name in ("y", "z"):
        error = (found[name] - eager[name]).double().norm() / eager[name].double().norm()
        assert error < tolerance, name


@each_device
@each_dtype
@pytest.mark.parametrize("cache_enabled", [True, False])
def test_weights_used_twice(device, dtype, cache_enabled):
    """Within one autocast, after a pass without gradients: autocast's cache of casts is no trap."""
    module, x = CASES["conv"].module(device), CASES["conv"].x(device, dtype)
    module.eval()  # so that both passes give the same
    with kernels_on(device, counting=False):
        once = amp_results(CASES["conv"].module(device).eval(), x, device, dtype)
        with autocast(device, dtype, cache_enabled=cache_enabled):
            with torch.no_grad():
                y = module(x)
            first, second = module(x), module(x)
        (first + second).backward(output_gradient(first))
    assert torch.equal(y, once["y"]) and torch.equal(first, once["y"])
    for name, gradient in gradients(module).items():
        assert torch.equal(gradient, 2 * once[name]), name


@each_device
@each_case
@each_dtype
def test_checkpointing_within_autocast(device, case, dtype):
    whole, parts, x = case.module(device), case.module(device), case.x(device, dtype)
    with kernels_on(device, counting=False):
        expected = amp_results(whole, x, device, dtype)
        for use_reentrant in (True, False):
            parts.load_state_dict(case.module(device).state_dict())
            parts.zero_grad()
            wrapped = torch.utils.checkpoint.checkpoint
            leaf = leaf_of(x)
            with autocast(device, dtype):
                y = wrapped(parts, leaf, use_reentrant=use_reentrant)
            y.backward(output_gradient(y))
            found = {"y": y.detach(), "dx": leaf.grad} | gradients(parts)
            assert_equal(found, {name: expected[name] for name in found})


@each_device
@each_case
@each_dtype
def test_double_backward(device, case, dtype):
    """Through the reference, which casts the master weights as the op has."""

    def penalty(module: nn.Module, x: Tensor, amp: bool = True) -> dict[str, Tensor]:
        leaf = leaf_of(x)
        with torch.autocast(x.device.type, dtype, enabled=amp):
            y = module(leaf)
        (dx,) = torch.autograd.grad(y.square().sum() / 1024, leaf, create_graph=True)
        dx.square().sum().backward()
        assert leaf.grad is not None
        return {"dx": dx.detach(), "x.grad": leaf.grad} | gradients(module)

    module, x = decided(case.module()).to(torch_device(device)).eval(), case.x(device, dtype)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    with kernels_on(device, counting=False):
        ours = penalty(module, x)
    with functional.use_kernels(False):
        eager, reference = penalty(plain, x), penalty(exact, x.double(), amp=False)
    assert_all_as_good_as_eager(ours, eager, reference, NOISE_FLOOR_EPS * torch.finfo(dtype).eps)


# GradScaler


def scaled_step(
    model: nn.Module,
    x: Tensor,
    scaler: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    device: str,
) -> None:
    optimizer.zero_grad()
    with autocast(device, torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@each_device
@each_case
def test_grad_scaler(device, case):
    """Steps whose gradients overflow are skipped and halve the scale; the next ones train."""
    module, x = case.module(device), case.x(device, torch.float16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(torch_device(device), init_scale=2.0**28, growth_interval=1000)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    skipped = 0
    with kernels_on(device, checks=False):
        while scaler.get_scale() > 1:
            scale = scaler.get_scale()
            scaled_step(module, x, scaler, optimizer, device)
            if scaler.get_scale() == scale:
                break
            assert scaler.get_scale() == scale / 2
            assert not all(g.isfinite().all() for g in gradients(module).values())
            assert_equal({name: p.detach() for name, p in module.named_parameters()}, before)
            skipped += 1
    assert skipped > 0 and scaler.get_scale() > 1
    assert all(g.isfinite().all() for g in gradients(module).values())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys()


@each_device
def test_scaled_gradients_are_those_of_the_loss(device):
    """A power of two scales exactly: unscaled, they differ by what underflows without it."""
    case = CASES["inception"]
    plain, scaled, x = case.module(device), case.module(device), case.x(device, torch.float16)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(torch_device(device), init_scale=8.0)
    with kernels_on(device, counting=False):
        for module in (plain, scaled):
            with autocast(device, torch.float16):
                loss = module(x).float().square().sum() / 64
            (scaler.scale(loss) if module is scaled else loss).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)  # as users do, between the two
    assert norm > 0
    for name, gradient in gradients(plain).items():
        error = (gradients(scaled)[name] - gradient).norm() / gradient.norm()
        assert error < torch.finfo(torch.float16).eps, name
