"""Training on the CUDA kernels keeps nothing from step to step, and repeats bit for bit."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fast_path import randn
from gate_cases import resident_bytes, saved_storages
from kernel_devices import needs_emulator
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from training_cases import assert_equal, gradients, small_googlenet

from inception_ext import GoogLeNetLoss
from inception_ext.googlenet import GoogLeNetOutputs
from inception_ext.testing import emulated

pytestmark = needs_emulator
LABELS = torch.arange(8)
STEPS, WARM_UP = 50, 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return small_googlenet()


def stepper(model: nn.Module, images: Tensor) -> Callable[[], GoogLeNetOutputs]:
    """A training step, optimizer and all; it returns the outputs."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    criterion = GoogLeNetLoss()

    def step() -> GoogLeNetOutputs:
        optimizer.zero_grad()
        outputs = model(images)
        criterion(outputs, LABELS[: len(images)]).backward()
        optimizer.step()
        return outputs

    return step


def live_tensors() -> int:
    """Of those that Python can reach."""
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def saved_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """What a step keeps for its backward, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that holds itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for address, size in sizes.items() if address not in parameters)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it here")
def test_50_steps_do_not_grow():
    """Had each step kept a tenth of what it saves for its backward, the process would be larger by
    that for every step."""
    model = network()
    step = stepper(model, randn(4, 3, 32, 32))
    with emulated(checks=False, counting=False):
        least = saved_bytes(model, step) / 10
        for _ in range(WARM_UP):
            step()
        tensors, before = live_tensors(), resident_bytes()
        for _ in range(STEPS - WARM_UP):
            step()
        assert live_tensors() <= tensors
        assert resident_bytes() - before < (STEPS - WARM_UP) * least


def test_outputs_and_what_was_saved_end_with_their_last_reference():
    """Counted by references alone: no cycle holds them until a collection."""
    model, images = network(), randn(4, 3, 32, 32)
    step = stepper(model, images)
    with emulated(checks=False, counting=False):
        step()  # the optimizer's state, and whatever else is made once
        gc.collect()
        gc.disable()
        try:
            outputs, saved = saved_storages(step)
            held = [images, LABELS, *model.parameters(), *outputs]
            mine = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
            kept = [s for s in saved if not s.expired() and s not in mine]
            ends = [StorageWeakRef(output.untyped_storage()) for output in outputs]
            references = [weakref.ref(output) for output in outputs]
            del outputs, held
            assert len(saved) > 200 and kept == []
            assert all(reference() is None for reference in references)
            assert all(storage.expired() for storage in ends)
        finally:
            gc.enable()


# The same bits


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
def test_deterministic_algorithms(amp, deterministic):
    """Nothing refuses to run, and order of execution shows in no bit of two steps' results."""
    runs = []
    for seed, workers in ((0, 1), (1, 2), (2, 0)):
        model = network()
        step = stepper(model, randn(4, 3, 32, 32))
        with (
            emulated(seed=seed, workers=workers, checks=False, counting=False),
            torch.autocast("cpu", torch.float16, enabled=amp),
        ):
            outputs = [step() for _ in range(2)]
        found = {
            f"{i} {n}": t.detach() for i, o in enumerate(outputs) for n, t in o._asdict().items()
        }
        runs.append(found | gradients(model) | model.state_dict())
    for other in runs[1:]:
        assert_equal(other, runs[0])
