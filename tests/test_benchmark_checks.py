"""What the benchmarks take for right: gradients rounded in another order, and no wrong ones."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from inception_ext.functional import use_kernels
from inception_ext.losses import GoogLeNetLoss

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SEEDS = range(3)


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def works(load):
    workload = load("workload")
    weights = workload.seeded_weights(heads=True)
    return [workload.decided_workload(weights, seed=seed) for seed in SEEDS]


@pytest.fixture
def status(load, works):
    """Of ``ours`` among contestants with these factories, by seed."""
    scenario, peers = load("scenario"), load("peers")

    def judged(ours):
        factories = {"ours": ours, peers.BASELINE: peers.train_eager}
        found = [
            scenario.run(
                "training check", factories, work, "fp32", device=load("devices").Host(), rounds=1
            )
            for work in works
        ]
        return [result["contestants"][0]["status"] for result in found]

    return judged


def test_right_gradients(load, status):
    peers = load("peers")

    def plain(work, dtype):
        call = peers.train_ours(work, dtype)

        def without_kernels(i):
            with use_kernels(False):
                return call(i)

        return without_kernels

    assert status(peers.train_ours) == ["ok"] * len(SEEDS)
    assert status(plain) == ["ok"] * len(SEEDS)


@pytest.mark.parametrize(
    "name",
    [
        "conv1.bn.bias",
        "inception3a.branch2.1.conv.weight",
        "inception4b.branch4.1.conv.weight",
        "aux1.fc1.weight",
        "fc.bias",
    ],
)
def test_a_gradient_that_is_wrong_by_a_hundredth(load, status, name):
    peers = load("peers")

    def wrong(work, dtype):
        call = peers.train_ours(work, dtype)
        model = work.model(load("workload").torchvision_googlenet())
        index = 1 + [parameter for parameter, _ in model.named_parameters()].index(name)

        def scaled(i):
            results = call(i)
            results[index] = results[index] * 1.01
            return results

        return scaled

    assert status(wrong) == ["wrong"] * len(SEEDS)


def test_a_head_that_weighs_too_much(load, status, monkeypatch):
    peers = load("peers")

    def wrong(work, dtype):
        with monkeypatch.context() as patch:
            patch.setattr(peers.inception_ext, "GoogLeNetLoss", lambda: GoogLeNetLoss(0.303))
            return peers.train_ours(work, dtype)

    assert status(wrong) == ["wrong"] * len(SEEDS)


@pytest.fixture(scope="module")
def stems(load):
    weights = load("workload").seeded_weights(heads=False)
    return [load("module_work").decided_stem(weights, seed=seed) for seed in SEEDS]


@pytest.fixture
def judged_stems(load, stems):
    """Status of ``ours`` with a stem's results changed by ``change(results)``, by seed."""
    scenario, parts = load("scenario"), load("module_work")

    def judged(change, **how):
        def ours(work, dtype):
            call = parts.TRAINING["ours"](work, dtype)
            return lambda i: change(call(i))

        baseline = load("peers").BASELINE
        factories = {"ours": ours, baseline: parts.TRAINING[baseline]}
        device = load("devices").Host()
        found = [
            scenario.run("training stem", factories, work, "fp32", device=device, rounds=1, **how)
            for work in stems
        ]
        return [result["contestants"][0]["status"] for result in found]

    return judged


def scaled(index, by):
    def change(results):
        results[index] = results[index] * by
        return results

    return change


def test_right_gradients_of_the_stem(judged_stems):
    assert judged_stems(lambda results: results) == ["ok"] * len(SEEDS)


@pytest.mark.parametrize("index", range(11))  # y, dx, and three convolutions with batch norm
def test_results_of_the_stem_that_are_wrong_by_a_thousandth(judged_stems, index):
    assert judged_stems(scaled(index, 1.001)) == ["wrong"] * len(SEEDS)


@pytest.mark.parametrize("index", range(11))
def test_gross_mistakes_are_found_where_chance_decides(judged_stems, index):
    assert judged_stems(scaled(index, 1.04), by_chance=True) == ["ok"] * len(SEEDS)
    assert judged_stems(scaled(index, 1.06), by_chance=True) == ["wrong"] * len(SEEDS)


def test_settled_shifts_decide_every_relu(load):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.BatchNorm2d(5),
    ).double()
    x = torch.randn(8, 3, 20, 20, dtype=torch.float64)
    before = [network[:2](x), network(x)]
    assert load("decisions").settle(network, x) == float("inf")  # no max pool
    after = [network[:2](x), network(x)]
    for y, settled in zip(before, after, strict=True):
        values = settled.transpose(0, 1).flatten(1)
        assert (values < 0).any(1).all() and (values > 0).any(1).all()
        closest = [z.transpose(0, 1).flatten(1).abs().amin(1).min() for z in (y, settled)]
        assert closest[1] > 1e-3 and closest[1] > 10 * closest[0]
    for norm in (network[1], network[4]):
        assert torch.equal(norm.bias, norm.bias.float().double())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 2, 0), (3, 1, 1), (2, 2, 0)])
def test_how_close_max_pools_decide(load, size, stride, padding, ceil_mode, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.relu(torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=generator))
    pool = nn.MaxPool2d(size, stride, padding, ceil_mode=ceil_mode)
    y = pool(x)
    want = float("inf")
    for place in (y > 0).nonzero():
        n, c, i, j = place.tolist()
        rows = slice(max(i * stride - padding, 0), i * stride - padding + size)
        columns = slice(max(j * stride - padding, 0), j * stride - padding + size)
        values = x[n, c, rows, columns].flatten().sort(descending=True).values
        assert values[0] == y[n, c, i, j]
        if len(values) > 1:
            want = min(want, (values[0] - values[1]).item())
    assert load("decisions").settle(pool, x) == want
