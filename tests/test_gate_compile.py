"""The compiled ops under torch.compile."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from fast_path import randn
from gate_cases import (
    FUSED,
    X,
    each_mode,
    results_of,
)
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.func import grad, vmap

from inception_ext import functional
from inception_ext.modules import BasicConv2d


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recording_backend(graphs: list[list[str]]) -> Callable:
    """A backend that notes the compiled ops of each graph, forward and backward."""

    def record(graph: torch.fx.GraphModule, _: object) -> Callable:
        targets = [target for node in graph.graph.nodes for target in (node.target, *node.args)]
        names = [t.name() for t in targets if isinstance(t, torch._ops.OpOverload)]
        graphs.append([n.removeprefix("inception_ext::") for n in names if "inception_ext" in n])
        return make_boxed_func(graph)

    return aot_autograd(fw_compiler=record, bw_compiler=record)


@each_mode
def test_compile(block, training, fresh_dynamo):
    block.train(training)
    eager = copy.deepcopy(block)
    graphs: list[list[str]] = []
    block.compile(backend=recording_backend(graphs), fullgraph=True)
    for _ in range(2):  # the second time with what the first has left in the buffers
        torch.testing.assert_close(results_of(block, X), results_of(eager, X))
    assert graphs == [[name] for name in FUSED]


@each_mode
def test_compile_the_other_ops(training, fresh_dynamo):
    torch.manual_seed(0)
    eager = nn.Sequential(BasicConv2d(16, 8, kernel_size=1), BasicConv2d(8, 8, kernel_size=3))
    eager.train(training)
    compiled = copy.deepcopy(eager)
    graphs: list[list[str]] = []

    @torch.compile(backend=recording_backend(graphs), fullgraph=True)
    def run(x):
        return functional.max_pool(compiled(x), 2, 2)

    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    run(x).square().sum().backward()
    functional.max_pool(eager(y), 2, 2).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())
    ops = [*["batch_norm_relu"] * 2, "max_pool"]
    assert graphs[0] == [f"{op}_forward" for op in ops]
    assert graphs[1] == [f"{op}_backward" for op in reversed(ops)]


def test_compile_for_any_batch(block, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block.eval(), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for n, h, w in ((2, 7, 6), (3, 9, 8), (5, 4, 11)):
        x = randn(n, 16, h, w)
        torch.testing.assert_close(compiled(x), block(x))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]  # compiled once


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_compile_within_functorch(block, transform, fresh_dynamo):
    block.eval()
    functions = {
        "vmap": lambda x: vmap(lambda image: block(image))(x[None]),
        "grad": lambda x: grad(lambda image: block(image).square().sum())(x),
    }
    function = functions[transform]
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), function(X))
    plain = torch.compile(lambda x: block(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(plain(X), block(X))


def test_compile_notices_the_switch(block, fresh_dynamo):
    block.eval()
    graphs: list[list[str]] = []
    compiled = torch.compile(block, backend=recording_backend(graphs), fullgraph=True)
    with torch.no_grad():
        compiled(X)
        with functional.use_kernels(False):
            compiled(X)
    assert graphs == [["inception_forward"], []]


@pytest.mark.parametrize("memory_format", ["contiguous_format", "channels_last"])
def test_inductor(block, memory_format, fresh_dynamo):
    """Which checks at run time the strides that the fake kernels promised."""
    block.to(memory_format=getattr(torch, memory_format))
    eager = copy.deepcopy(block)
    block.compile(fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(results_of(block, X), results_of(eager, X))
