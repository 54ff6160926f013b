"""The network of the 2014 paper."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inception_ext
from inception_ext.bvlc import BVLCGoogLeNet, bvlc_googlenet, paper_aux_pool


def paper_forward(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network written down from the paper's table 1 and figure 3: (main, aux1, aux2)."""

    def conv(name, x, **kwargs):
        return F.conv2d(x, p[f"{name}.conv.weight"], p[f"{name}.conv.bias"], **kwargs).relu()

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def normalise(x):  # over 5 channels, as a sum written out
        squares = F.pad(x.square(), (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, i : i + x.shape[1]] for i in range(5))
        return x / (1 + 1e-4 / 5 * total) ** 0.75

    def inception(name, x):
        return torch.cat(
            [
                conv(f"{name}.branch1", x),
                conv(f"{name}.branch2.1", conv(f"{name}.branch2.0", x), padding=1),
                conv(f"{name}.branch3.1", conv(f"{name}.branch3.0", x), padding=2),
                conv(f"{name}.branch4.1", F.max_pool2d(x, 3, 1, padding=1)),
            ],
            1,
        )

    def linear(name, x):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    def head(name, x):
        x = conv(f"{name}.conv", F.avg_pool2d(x, 5, 3))
        return linear(f"{name}.fc2", linear(f"{name}.fc1", x.flatten(1)).relu())

    x = normalise(pool(conv("conv1", x, stride=2, padding=3)))
    x = pool(normalise(conv("conv3", conv("conv2", x), padding=1)))
    x = pool(inception("inception3b", inception("inception3a", x)))
    x = inception("inception4a", x)
    aux1 = head("aux1", x)
    for name in ("inception4b", "inception4c", "inception4d"):
        x = inception(name, x)
    aux2 = head("aux2", x)
    x = pool(inception("inception4e", x))
    x = inception("inception5b", inception("inception5a", x))
    return linear("fc", F.avg_pool2d(x, 7).flatten(1)), aux1, aux2


def test_computes_the_network_of_the_paper():
    torch.manual_seed(0)
    model = bvlc_googlenet(10, dropout=0.0, dropout_aux=0.0).double()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        outputs = model(images)
        main, aux1, aux2 = paper_forward(model.state_dict(), images)
        torch.testing.assert_close(outputs.logits, main)
        torch.testing.assert_close(outputs.aux_logits1, aux1)
        torch.testing.assert_close(outputs.aux_logits2, aux2)
        assert main.std() > 0.01  # and not of zeros
        torch.testing.assert_close(model.eval()(images), main)


def test_parameter_counts():
    def count(model):
        return sum(p.numel() for p in model.parameters())

    assert count(bvlc_googlenet(aux_logits=False)) == 6_998_552  # "7 million" in the paper
    assert count(bvlc_googlenet()) == 13_378_280


def test_layers():
    model = bvlc_googlenet()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    for i in range(1, 5):
        pool = getattr(model, f"maxpool{i}")
        assert (pool.kernel_size, pool.stride, pool.ceil_mode) == (3, 2, True)
    for lrn in (model.lrn1, model.lrn2):
        assert (lrn.size, lrn.alpha, lrn.beta, lrn.k) == (5, 1e-4, 0.75, 1.0)
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (0.4, 0.7, 0.7)


def test_initial_values():
    torch.manual_seed(0)
    model = bvlc_googlenet(10)
    classifiers = {"fc", "aux1.fc2", "aux2.fc2"}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bias = 0.0 if name in classifiers else 0.2
            assert (module.bias == bias).all(), name
            bound = (3 / module.weight[0].numel()) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name


@pytest.mark.parametrize("size", [(31, 31), (64, 64), (33, 47), (224, 224), (300, 224)])
def test_image_sizes(size):
    model = bvlc_googlenet(10)
    outputs = model(torch.randn(2, 3, *size))
    assert [tuple(o.shape) for o in outputs] == [(2, 10)] * 3
    assert model.eval()(torch.randn(1, 3, *size)).shape == (1, 10)


def test_smaller_images_are_an_error():
    with pytest.raises(RuntimeError, match="Output size is too small"):
        bvlc_googlenet(10)(torch.randn(2, 3, 30, 30))


@pytest.mark.parametrize("size", [(14, 14), (16, 15)])
def test_aux_pool_of_the_papers_maps(size):
    x = torch.randn(2, 8, *size)
    assert torch.equal(paper_aux_pool(x), F.avg_pool2d(x, 5, 3))


@pytest.mark.parametrize("size", [(4, 4), (2, 3), (13, 14), (14, 17), (40, 40)])
def test_aux_pool_of_other_maps(size):
    x = torch.randn(2, 8, *size)
    assert torch.equal(paper_aux_pool(x), F.adaptive_avg_pool2d(x, 4))


def test_has_the_methods_of_googlenet():
    model = bvlc_googlenet(10, aux_logits=True)
    assert isinstance(model, inception_ext.GoogLeNet) and isinstance(model, BVLCGoogLeNet)
    outputs = model(torch.randn(2, 3, 64, 64))
    assert type(outputs) is inception_ext.GoogLeNetOutputs
    assert inception_ext.GoogLeNetLoss()(outputs, torch.tensor([1, 2])).isfinite()
    assert model.forward_features(torch.randn(2, 3, 64, 64)).shape == (2, model.num_features, 2, 2)

    model.reset_classifier(7)
    assert (model.get_classifier().bias == 0).all()
    outputs = model(torch.randn(2, 3, 64, 64))
    assert [tuple(o.shape) for o in outputs] == [(2, 7)] * 3
    assert isinstance(bvlc_googlenet(10, aux_logits=False)(torch.randn(2, 3, 64, 64)), Tensor)


def test_all_parameters_get_gradients():
    model = bvlc_googlenet(10)
    loss = inception_ext.GoogLeNetLoss()(model(torch.randn(4, 3, 64, 64)), torch.arange(4))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_learns():
    """A few steps on one batch, whose classes differ in brightness, bring the loss down."""
    torch.manual_seed(0)
    model = bvlc_googlenet(4, dropout=0.0, dropout_aux=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    labels = torch.arange(8) % 4
    images = torch.randn(8, 3, 48, 48) + labels.view(-1, 1, 1, 1)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = inception_ext.GoogLeNetLoss()(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(clone):
    model = bvlc_googlenet(10).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(clone(model)(images), model(images))


def test_tracing_scripting_compiling():
    model = bvlc_googlenet(10, dropout=0.0, dropout_aux=0.0)
    images = torch.randn(1, 3, 224, 224)
    expected = model(images)
    for other in (
        torch.fx.symbolic_trace(model),
        torch.jit.script(model),
        torch.compile(model, backend="eager", fullgraph=True),
    ):
        for a, b in zip(other(images), expected, strict=True):
            torch.testing.assert_close(a, b)
