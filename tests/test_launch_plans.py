"""Where a plan puts the tensors of its launches: inception_ext._launches."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_devices import needs_emulator

import inception_ext
from inception_ext._frozen_cuda import FusedNetwork
from inception_ext._launches import Exact, Launcher, Lifetime, Plan, Recorder, place
from inception_ext.testing import emulated


@st.composite
def lifetimes(draw: Any) -> Lifetime:
    first = draw(st.integers(0, 12))
    return Lifetime(draw(st.integers(0, 40)) * 256, first, first + draw(st.integers(0, 4)))


@given(st.lists(lifetimes(), max_size=16))
def test_what_lives_at_the_same_time_shares_no_memory(buffers):
    offsets, size = place(buffers)
    for i, a in enumerate(buffers):
        assert offsets[i] >= 0 and offsets[i] + a.size <= size and offsets[i] % 256 == 0
        for j, b in enumerate(buffers[:i]):
            if a.first <= b.last and b.first <= a.last:
                assert offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
    at_once = [sum(b.size for b in buffers if b.first <= t <= b.last) for t in range(17)]
    assert max(at_once) <= size <= sum(b.size for b in buffers)


def test_a_chain_takes_the_memory_of_two():
    sizes = [100, 300, 200, 250, 50]
    chain = [Lifetime(256 * size, i, i + 1) for i, size in enumerate(sizes)]
    assert place(chain)[1] == 256 * 500
    assert place([]) == ([], 0)


@needs_emulator
@pytest.mark.parametrize(("batch", "dtype"), [(1, torch.float16), (8, torch.float32)])
def test_memory_of_googlenet(batch, dtype):
    """What lives at the same time is at most an Inception module's input, output and reductions."""
    model = inception_ext.GoogLeNet(1000, aux_logits=False, init_weights=False)
    with emulated() as launches:
        like = torch.empty(0)
        (segment,) = FusedNetwork(model.eval(), dtype, torch.float32)._parts
        recorder = Recorder(like, dtype, Exact(True, True), None)
        images = torch.empty(batch, 3, 224, 224, device="meta")
        plan = Plan(recorder, segment.run(recorder, images_of(images)), images)
    assert launches == []
    of_3b = batch * 28 * 28 * (256 + 480 + 128 + 32)  # in, out, reduced
    assert plan.size <= dtype.itemsize * of_3b * 1.01


def images_of(pixels: torch.Tensor) -> Any:
    from inception_ext._images import Images

    return Images(pixels, (1.0,) * 3, (0.0,) * 3)


class Squares:
    """Stands for the ops: y = x * x, into the last argument."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def square(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.calls.append((x, y))
        y.copy_(x * x)


def steps(launch: Launcher, x: torch.Tensor) -> torch.Tensor:
    """x ** 16, the upper channels of which are read by a launch of their own."""
    for _ in range(3):
        y = launch.empty(*x.shape)
        launch("square", x, y)
        x = y
    y = launch.empty(*x.shape)
    launch("square", x[:, :2], y[:, :2])
    launch("square", x[:, 2:], y[:, 2:])
    return y[:, :, 0]


@needs_emulator
def test_a_plan_runs_what_was_recorded():
    ops, like = Squares(), torch.empty(0)
    with emulated(counting=False):
        recorder = Recorder(like, torch.float32, Exact(True, True), None)
    recorder._ops = ops
    given = torch.empty(2, 4, 3, 5, device="meta")
    plan = Plan(recorder, steps(recorder, given), given)
    assert ops.calls == [] and plan.size == 2 * 512  # of which the one is free when it is needed
    arena = torch.empty(plan.size, dtype=torch.uint8)
    plan.bind(arena)
    results = []
    for seed in range(2):
        x = torch.rand(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed))
        arena.fill_(0xFF)
        ops.calls.clear()
        y = plan.start(x)
        assert len(ops.calls) == 1 and ops.calls[0][0] is x
        plan.run_settled()
        assert len(ops.calls) == 3
        results.append(plan.finish(y))
        torch.testing.assert_close(results[-1], x[:, :, 0] ** 16)
        inside = range(arena.data_ptr(), arena.data_ptr() + arena.numel())
        assert [y.data_ptr() in inside for _, y in ops.calls] == [True] * 3 + [False] * 2
    assert results[0].data_ptr() != results[1].data_ptr()
