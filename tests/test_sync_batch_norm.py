"""SyncBatchNorm on the CUDA kernels: two processes do what one does with the joined batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from closeness import BLOCK_NOISE_FLOOR, assert_as_good_as_eager, assert_network_as_good_as_eager
from fast_path import bn_tensors, randn
from kernel_devices import exact_products, kernel_ops, needs_emulator
from test_batch_norm_variants import batch_norms, make, results_of
from test_training_kernels import judge
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inception_ext
from inception_ext import functional
from inception_ext.testing import emulated

# Module, variant of its batch norms, images of each process.
CASES: dict[str, tuple[str, str, tuple[int, int]]] = {
    "inception, even": ("inception", "default", (2, 2)),
    "inception, uneven": ("inception", "default", (3, 1)),
    "inception, one without images": ("inception", "default", (0, 3)),
    "inception, cumulative": ("inception", "cumulative", (1, 2)),
    "inception, no statistics": ("inception", "no statistics", (1, 2)),
    "conv, uneven": ("conv", "default", (3, 1)),
    "conv, a value each": ("conv", "default", (1, 1)),
    "chain, uneven": ("chain", "default", (3, 1)),
}
BATCHES = 2
NETWORK_IMAGES = (3, 1)
OWN = ("y", "dx")  # what each process has for its own images
SHARED = ("running_mean", "running_var", "num_batches_tracked")


def batches_of(case: str) -> list[Tensor]:
    size = (1, 1) if case == "conv, a value each" else (6, 5)
    return [randn(sum(CASES[case][2]), 16, *size, seed=300 + i) for i in range(BATCHES)]


def images_of(rank: int, split: tuple[int, int]) -> slice:
    return slice(0, split[0]) if rank == 0 else slice(split[0], None)


def add_up(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def network(state: dict[str, Tensor]) -> nn.Module:
    model = inception_ext.GoogLeNet(10, init_weights=False, dropout=0.0, dropout_aux=0.0)
    model.load_state_dict(state)
    return model.train()


def network_step(model: nn.Module, images: Tensor, weight: float) -> dict[str, Tensor]:
    """Outputs; a step by the gradients of their mean square times ``weight``."""
    outputs = model(images)
    (weight * sum(output.square().sum() for output in outputs)).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    return {k: v.detach() for k, v in outputs._asdict().items()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {k: v.detach() for k, v in (gradients | model.state_dict()).items()}


def second_gradient(module: nn.Module, x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf).square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), leaf)[0]


def sync(module: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def run_case(rank: int, case: str) -> dict[str, Any]:
    kind, variant, split = CASES[case]
    module = sync(make(kind, variant))
    with emulated(workers=1) as launches:
        results = results_of(module, batches_of(case), images_of(rank, split))
    for name in sorted(results.keys() - {*OWN, *SHARED}):
        results[name] = add_up(results[name])
    return {"results": results, "launches": [(x["op"], x["kernel"]) for x in launches]}


def run_network(rank: int, state: dict[str, Tensor]) -> dict[str, Any]:
    model = network(state)
    # torch's DDP takes SyncBatchNorm on a GPU only, unless it comes later.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    sync(model)
    images = randn(sum(NETWORK_IMAGES), 3, 64, 64, seed=5)[images_of(rank, NETWORK_IMAGES)]
    # Its gradients are means over the processes.
    with emulated(workers=1, checks=False) as launches:
        outputs = network_step(wrapped, images, 2 / sum(NETWORK_IMAGES))
    ops = {launch["op"] for launch in launches}
    return {"outputs": outputs, "state": state_of(model), "ops": ops}


def run_gate(rank: int) -> dict[str, Any]:
    """What the gate says of groups, and what ops say of wrong ones."""
    one, both = dist.new_group([0]), dist.new_group([0, 1])
    facts: dict[str, Any] = {}
    block = sync(make("inception", "default"))
    facts["joined"] = repr(block).splitlines()[1].strip()
    batch_norms(block)[0].process_group = both
    facts["two groups"] = repr(block).splitlines()[1].strip()
    for bn in batch_norms(block):
        bn.process_group = one
    x = randn(2, 16, 6, 5, seed=rank)
    with emulated(workers=1) as launches:
        if rank == 0:  # nobody else is there to answer
            block(x).sum().backward()
            sync(make("inception", "default")).eval()(x)
    facts["alone"] = len(launches)
    module = sync(make("inception", "default"))
    with emulated(workers=1):
        facts["second gradient"] = second_gradient(module, randn(2, 16, 6, 5, seed=rank))
    ops, name = kernel_ops("emulator"), dist.group.WORLD.group_name
    try:
        ops.batch_norm_relu_forward(x, *bn_tensors(16).values(), True, 0.1, 1e-3, name, 3)
    except RuntimeError as error:
        facts["error"] = str(error)
    return facts


def work(rank: int, folder: str, state: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with exact_products():
        results = {case: run_case(rank, case) for case in CASES}
        results |= {"network": run_network(rank, state), "gate": run_gate(rank)}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, lively_state: dict[str, Tensor]
) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("both")
    mp.spawn(work, (str(folder), lively_state), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@needs_emulator
@pytest.mark.parametrize("case", CASES)
def test_two_are_one_on_the_joined_batch(both, case):
    kind, variant, split = CASES[case]
    parts = [found[case]["results"] for found in both]
    ours = dict(parts[0])
    for name in ours:
        if name in OWN:
            by_rank = [
                part[name].split([n] * BATCHES) for part, n in zip(parts, split, strict=True)
            ]
            ours[name] = torch.cat([p for batch in zip(*by_rank, strict=True) for p in batch])
        else:
            assert torch.equal(*(part[name] for part in parts)), name
    module = make(kind, variant)
    exact = copy.deepcopy(module).double()
    with functional.use_kernels(False):
        eager = results_of(module, batches_of(case))
        expected = results_of(exact, [x.double() for x in batches_of(case)])
    judge([(ours, eager, expected)], torch.float32)


@needs_emulator
def test_one_exchange_more_a_stage(both):
    """A launch that merges the processes' statistics, and one that finishes the own sums."""
    launches = both[0]["inception, even"]["launches"]
    ops = [op for op, _ in launches[: len(launches) // BATCHES]]
    assert ops == ["inception_forward"] * (1 + 5 + 2) + ["inception_backward"] * (9 + 2)


@needs_emulator
def test_a_step_of_a_network_under_ddp(both, lively_state):
    count = sum(NETWORK_IMAGES)
    images = randn(count, 3, 64, 64, seed=5)
    expected = []
    with functional.use_kernels(False):
        for dtype in (torch.float32, torch.float64):
            model = network(lively_state).to(dtype)
            outputs = network_step(model, images.to(dtype), 1 / count)
            expected.append(outputs | state_of(model))
        parameters = dict(model.named_parameters())
    found = [rank["network"] for rank in both]
    ours = {
        name: torch.cat([part["outputs"][name] for part in found]) for name in found[0]["outputs"]
    }
    for part in found:
        assert part["ops"] >= {"inception_backward", "conv_chain_backward"}
        for name, tensor in part["state"].items():
            assert torch.equal(tensor, found[0]["state"][name]), name
    # Parameters go by their gradients, in which rounding errors that decide a ReLU are allowed for.
    ours |= found[0]["state"]
    assert_network_as_good_as_eager(
        *({k: v for k, v in side.items() if k not in parameters} for side in (ours, *expected))
    )


@needs_emulator
def test_the_gate(both):
    first, second = (found["gate"] for found in both)
    assert first["joined"] == second["joined"] == "fused"
    assert "batch norms that differ in" in first["two groups"]
    assert (first["alone"], second["alone"]) == (6 + 8 + 6, 0)  # x needs no gradient
    error = "inception_ext::batch_norm_relu_forward: group_size: expected 2, the size of group '"
    assert first["error"].startswith(error) and first["error"].endswith("', got 3")


@needs_emulator
def test_double_backward(both):
    module = make("inception", "default")
    x = torch.cat([randn(2, 16, 6, 5, seed=rank) for rank in range(2)])
    with functional.use_kernels(False):
        eager = second_gradient(module, x)
        exact = second_gradient(make("inception", "default").double(), x.double())
    ours = torch.cat([found["gate"]["second gradient"] for found in both])
    assert_as_good_as_eager(ours, eager, exact, BLOCK_NOISE_FLOOR)


@needs_emulator
@pytest.mark.parametrize(
    ("training", "group", "text"),
    [
        (True, ("", 0), "group_size: expected at least 1, got 0"),
        (True, ("nobody", 2), "group_name: expected the name of a process group, got 'nobody'"),
        (False, ("nobody", 2), "group_size: expected 1 in evaluation mode, got 2"),
    ],
)
def test_wrong_groups(training, group, text):
    ops = kernel_ops("emulator")
    x, vectors = randn(2, 8, 3, 3), list(bn_tensors(8).values())
    lists, filters = [[vector] for vector in vectors], [randn(8, 8, 1, 1)]
    settings = (training, 0.1, 1e-3)
    sixes = [[vector.clone() for _ in range(6)] for vector in vectors]
    six = [randn(8, 8, size, size) for size in (1, 1, 3, 1, 3, 1)]
    calls = {
        "batch_norm_relu_forward": (x, *vectors, *settings, *group),
        "conv_chain_forward": (
            *(x, filters, *lists, [1], [0], [], *settings, False, True, *group),
        ),
        "inception_forward": (x, six, *sixes, *settings, False, True, *group),
        "batch_norm_relu_backward": (
            *(x, x, *vectors[:2], vectors[2], vectors[3], training, True, *group),
        ),
        "conv_chain_backward": (
            *(x, x, filters, *lists[:2], x, x, torch.zeros(0, dtype=torch.uint8), *vectors[2:]),
            *([1], [0], [], training, [True] * 2, True, True, *group),
        ),
        "inception_backward": (
            *(x, x, six, *sixes[:2], *[x] * 7, torch.zeros(0), torch.zeros(48), torch.zeros(48)),
            *(training, [True] * 7, True, True, *group),
        ),
    }
    for op, arguments in calls.items():
        with pytest.raises(RuntimeError, match=f"inception_ext::{op}: {text}"):
            getattr(ops, op)(*arguments)
