"""The autograd functions on the CUDA kernels behave as PyTorch's own do: checkpoints, hooks,
accumulation, graphs kept and freed, gradients of any strides, no work that nobody asked for."""

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from closeness import BLOCK_NOISE_FLOOR, NOISE_FLOOR_EPS, assert_all_as_good_as_eager
from fast_path import ALL_ARRANGEMENTS, randn
from gate_cases import saved_storages
from kernel_devices import each_device, exact_products, kernels_on, needs_emulator, torch_device
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from training_cases import (
    CASES,
    assert_equal,
    decided,
    each_case,
    gradients,
    leaf_of,
    output_gradient,
    results_of,
    step,
)

from inception_ext import functional
from inception_ext.modules import BasicConv2d
from inception_ext.testing import emulated


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    with exact_products():
        yield


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


# Checkpoints


@each_device
@each_case
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(device, case, use_reentrant):
    """Equal bits. The running statistics take the batch in twice, as those of plain PyTorch do."""
    whole, parts = case.module(device), case.module(device)
    x = case.x(device)

    def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(module, x, use_reentrant=use_reentrant)

    with kernels_on(device, counting=False):
        expected = step(whole, x)
        whole(x)
    with kernels_on(device) as launches:
        ours = step(checkpointed(parts), x)
    assert_equal(ours, expected)
    assert_equal(gradients(parts), gradients(whole))
    assert_equal(buffers(parts), buffers(whole))
    if device == "emulator":
        ops = Counter(launch["op"] for launch in launches)
        assert ops.keys() == {f"{case.op}_forward", f"{case.op}_backward"}

    plain, exact = case.module(device), case.module(device).double()
    with functional.use_kernels(False):
        step(checkpointed(plain), x)
        step(checkpointed(exact), x.double())
    assert_all_as_good_as_eager(buffers(parts), buffers(plain), buffers(exact), BLOCK_NOISE_FLOOR)
    assert all(b == 2 for name, b in buffers(plain).items() if name.endswith("batches_tracked"))


# Hooks


@each_device
@each_case
def test_hooks_on_parameters(device, case):
    module, seen = case.module(device), []
    with kernels_on(device, counting=False):
        expected = results_of(case.module(device), case.x(device))
    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda grad: 2 * grad)
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.append((name, p.grad.clone()))
        )
    with kernels_on(device, counting=False):
        step(module, case.x(device))
    assert Counter(name for name, _ in seen) == Counter(
        name for name, _ in module.named_parameters()
    )
    for name, grad in seen:
        assert torch.equal(grad, 2 * expected[f"{name}.grad"]), name
    assert_equal(gradients(module), {f"{name}.grad": grad for name, grad in seen})


@each_device
@each_case
def test_an_optimizer_within_backward(device, case):
    """Each parameter moves as soon as its gradient is there, which is then given up."""
    at_once, after = case.module(device), case.module(device)

    def move(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in at_once.parameters():
        parameter.register_post_accumulate_grad_hook(move)
    for _ in range(2):
        with kernels_on(device, counting=False):
            ours, expected = step(at_once, case.x(device)), step(after, case.x(device))
        assert_equal(ours, expected)
        assert gradients(at_once) == {}
        for parameter in after.parameters():
            move(parameter)
    assert_equal(dict(at_once.named_parameters()), dict(after.named_parameters()))


# Several backward passes


@each_device
@each_case
def test_accumulation_over_two_micro_batches(device, case):
    module, x = case.module(device), case.x(device)
    halves = [x, x.flip(0) + 0.5]
    with kernels_on(device, counting=False):
        first, second = (results_of(copy.deepcopy(module), half) for half in halves)
        for half in halves:
            step(module, half)
    expected = {name: first[name] + second[name] for name in gradients(module)}
    assert_equal(gradients(module), expected)


@each_device
@each_case
def test_two_backward_passes_over_one_graph(device, case):
    module, leaf = case.module(device), leaf_of(case.x(device))
    with kernels_on(device, counting=False):
        y = module(leaf)
        gradient = output_gradient(y)
        y.backward(gradient, retain_graph=True)
        once = {"dx": leaf.grad.clone()} | {k: g.clone() for k, g in gradients(module).items()}
        y.backward(gradient)
        twice = {"dx": leaf.grad} | gradients(module)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward(gradient)
    assert_equal(twice, {name: 2 * grad for name, grad in once.items()})


# What is saved


def inputs_of(case: str) -> list[str]:
    """x and the parameters of a module."""
    return ["x", *(name for name, _ in CASES[case].module().named_parameters())]


@needs_emulator
@pytest.mark.parametrize(
    ("case", "name"), [(case, name) for case in CASES for name in inputs_of(case)]
)
def test_what_changes_in_place_before_backward_is_noticed(case, name):
    module, x = CASES[case].module(), CASES[case].x()
    with emulated(checks=False, counting=False):
        y = module(x)
        with torch.no_grad():
            (x if name == "x" else module.get_parameter(name)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@each_device
@each_case
def test_the_output_may_change_in_place(device, case):
    """The backward finds the ReLU's mask without it."""
    module, leaf = case.module(device), leaf_of(case.x(device))
    with kernels_on(device, counting=False):
        y = module(leaf)
        gradient = output_gradient(y)
        y.mul_(2).backward(gradient)
        expected = results_of(case.module(device), case.x(device))
    assert torch.equal(leaf.grad, 2 * expected["dx"])


@each_device
@each_case
def test_saved_tensors_that_were_stored_elsewhere(device, case):
    """As by ``save_on_cpu``: they come back at other addresses and contiguous."""
    with kernels_on(device, counting=False):
        expected = results_of(case.module(device), case.x(device))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: tensor.cpu().contiguous().clone(),
            lambda tensor: tensor.to(case.x(device).device),
        ):
            ours = results_of(case.module(device), case.x(device))
    assert_equal(ours, expected)


@needs_emulator
@each_case
@pytest.mark.parametrize("how", ["backward", "dropped", "no grad"])
def test_saved_tensors_are_freed(case, how):
    """By counts of references alone, also while the output lives on."""
    module = case.module()
    gc.collect()
    gc.disable()
    try:
        with emulated(checks=False, counting=False), torch.set_grad_enabled(how != "no grad"):
            y, saved = saved_storages(lambda: module(leaf_of(case.x())))
            parameters = {StorageWeakRef(p.untyped_storage()) for p in module.parameters()}
            kept = len(list(module.parameters())) + case.saved
            assert len(saved) == (0 if how == "no grad" else kept)
            output = StorageWeakRef(y.untyped_storage())
            assert output not in saved
            if how == "backward":
                y.sum().backward()
                y = y.detach()
            elif how == "dropped":
                del y
        assert output.expired() == (how == "dropped")
        assert [s for s in saved if not s.expired() and s not in parameters] == []
    finally:
        gc.enable()


# Gradients that come in


@each_device
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_output_gradients_of_any_strides(device, case, dtype):
    """Those of nchw or of slices, and those that torch expands, as the gradient of a sum is."""
    module, x = decided(case.module()).to(torch_device(device), dtype), case.x(device, dtype)
    floor = NOISE_FLOOR_EPS * torch.finfo(dtype).eps
    floor = BLOCK_NOISE_FLOOR if dtype == torch.float32 else floor

    def run(
        module: nn.Module, x: Tensor
    ) -> Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]]:
        """Gradients of one forward pass, from an output's gradient in some arrangement."""
        leaf = leaf_of(x)
        inputs = [leaf, *module.parameters()]
        y = module(leaf)

        def gradients(arrange: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
            given = arrange(output_gradient(y.float()).to(dtype)).to(y.dtype)
            found = torch.autograd.grad(y, inputs, given, retain_graph=True)
            # Together: those of a constant are 0 behind a batch norm, but for rounding.
            return {"gradients": torch.cat([g.flatten() for g in found])}

        return gradients

    with functional.use_kernels(False):
        eager, reference = run(module, x), run(copy.deepcopy(module).double(), x.double())
        expected = [(eager(a), reference(a)) for a in ALL_ARRANGEMENTS.values()]
    with kernels_on(device, counting=False):
        ours = run(module, x)
        for arrange, others in zip(ALL_ARRANGEMENTS.values(), expected, strict=True):
            assert_all_as_good_as_eager(ours(arrange), *others, floor)
        leaf = leaf_of(x)
        y = module(leaf)
        y.sum().backward()
        (expected_dx,) = torch.autograd.grad(module(leaf), leaf, torch.ones_like(y))
    assert torch.equal(leaf.grad, expected_dx)


# Work


def launches_of(run: Callable[[], object]) -> Counter[str]:
    """Of the backward kernels, by name."""
    with emulated(checks=False) as launches:
        run()
    return Counter(
        launch["kernel"].split("<")[0] for launch in launches if launch["op"].endswith("_backward")
    )


WGRAD, CONV, PACK = "conv_wgrad_kernel", "conv_train_kernel", "pack_weights_kernel"


@needs_emulator
@pytest.mark.parametrize("ask", ["grad", "backward"])
@pytest.mark.parametrize(
    ("case", "wanted", "saved"),
    [
        ("inception", ["x"], {WGRAD: 2}),
        ("inception", ["branch1.conv.weight"], {CONV: 1, WGRAD: 1}),
        ("inception", ["branch2.1.conv.weight"], {CONV: 1, WGRAD: 1}),
        ("inception", ["branch4.1.bn.bias"], {CONV: 1, WGRAD: 2}),
        ("chain", ["x"], {WGRAD: 2}),
        ("chain", ["second.conv.weight"], {CONV: 1, WGRAD: 1}),
        ("conv", ["x"], {WGRAD: 1}),
        ("conv", ["conv.weight"], {CONV: 1}),
        ("conv", ["bn.weight", "bn.bias"], {CONV: 1, WGRAD: 1}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_a_part_of_the_gradients_is_a_part_of_the_work(case, wanted, saved, ask):
    """Asked for some of the gradients, no launch computes others; those found are the same."""
    module, leaf = CASES[case].module(), leaf_of(CASES[case].x())
    tensors = {"x": leaf} | dict(module.named_parameters())
    with emulated(checks=False, counting=False):
        y = module(leaf)
    everything = launches_of(lambda: y.sum().backward(retain_graph=True))
    expected = {name: tensors[name].grad for name in wanted}
    for tensor in tensors.values():
        tensor.grad = None

    def run() -> None:
        inputs = [tensors[name] for name in wanted]
        if ask == "backward":
            y.sum().backward(inputs=inputs)
            return
        for tensor, grad in zip(inputs, torch.autograd.grad(y.sum(), inputs), strict=True):
            tensor.grad = grad

    partial = launches_of(run)
    del everything[PACK], partial[PACK]  # filters that no launch reads are not packed either
    assert everything - partial == Counter(saved)
    assert {name for name, t in tensors.items() if t.grad is not None} == set(wanted)
    assert_equal({name: tensors[name].grad for name in wanted}, expected)


@needs_emulator
@each_case
@pytest.mark.parametrize("frozen", ["conv.weight", "bn.weight", "bn.bias", "bn", "x"])
def test_what_needs_no_gradient_gets_none(case, frozen):
    """The others are what they are otherwise."""
    with emulated(checks=False, counting=False):
        expected = results_of(case.module(), case.x())
    module, leaf = case.module(), case.x().requires_grad_(frozen != "x")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen not in name)
    with emulated() as launches:
        y = module(leaf)
        y.backward(output_gradient(y))
    found = gradients(module) | ({} if leaf.grad is None else {"dx": leaf.grad})
    wanted = {f"{n}.grad" for n, p in module.named_parameters() if frozen not in n}
    assert found.keys() == (wanted if frozen == "x" else wanted | {"dx"})
    assert_equal(found, {name: expected[name] for name in found})
    if frozen == "conv.weight":
        assert not any(launch["kernel"].startswith(WGRAD) for launch in launches)


# Derivatives of higher order


def second_order(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """First derivatives, and those of a function of them."""
    leaf = leaf_of(x)
    inputs = [leaf, *module.parameters()]
    y = module(leaf)
    first = torch.autograd.grad(y, inputs, output_gradient(y), create_graph=True)
    penalty = sum((g * randn(*g.shape, seed=6).to(g)).square().sum() for g in first)
    second = torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
    found = {f"first {i}": g.detach() for i, g in enumerate(first)}
    return found | {f"second {i}": g for i, g in enumerate(second)}


@each_device
@each_case
def test_double_backward(device, case):
    module, x = case.module(device), case.x(device)
    plain, exact = copy.deepcopy(module), copy.deepcopy(module).double()
    with kernels_on(device) as launches:
        ours = second_order(module, x)
    assert {launch["op"] for launch in launches} <= {f"{case.op}_forward"}
    with functional.use_kernels(False):
        eager, reference = second_order(plain, x), second_order(exact, x.double())
    assert_all_as_good_as_eager(ours, eager, reference, BLOCK_NOISE_FLOOR)


@needs_emulator
def test_anomalies_are_reported():
    """With the line of the forward pass that belongs to them."""
    module = BasicConv2d(16, 8, kernel_size=1)
    with emulated(counting=False), pytest.warns(UserWarning), torch.autograd.detect_anomaly():
        y = module(leaf_of(CASES["conv"].x()))
        with pytest.raises(RuntimeError, match="ConvChainBackward' returned nan values"):
            y.backward(torch.full_like(y, torch.nan))
