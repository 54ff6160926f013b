"""The reference ops compute their formulas, written out here a second time."""

import pytest
import torch
import torch.nn.functional as F

from inception_ext import Inception, reference


def test_batch_norm_relu_in_training():
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    weight, bias = torch.rand(6).double(), torch.randn(6).double()
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    y = reference.batch_norm_relu(x, weight, bias, mean, var, True, 0.1, 1e-3)

    batch_mean = x.mean((0, 2, 3))
    batch_var = x.var((0, 2, 3), unbiased=False)
    shape = (1, 6, 1, 1)
    normal = (x - batch_mean.view(shape)) / (batch_var.view(shape) + 1e-3).sqrt()
    torch.testing.assert_close(y, (normal * weight.view(shape) + bias.view(shape)).clamp(min=0))
    torch.testing.assert_close(mean, 0.1 * batch_mean)
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var((0, 2, 3), unbiased=True))


def test_batch_norm_relu_in_inference():
    x, mean, var = torch.randn(2, 6, 3, 3), torch.randn(6), torch.rand(6)
    kept = (mean.clone(), var.clone())
    y = reference.batch_norm_relu(x, None, None, mean, var, False, 0.1, 1e-3)
    shape = (1, 6, 1, 1)
    expected = (x - mean.view(shape)) / (var.view(shape) + 1e-3).sqrt()
    torch.testing.assert_close(y, expected.clamp(min=0))
    assert torch.equal(mean, kept[0]) and torch.equal(var, kept[1])


def test_batch_norm_relu_keeps_nan():
    x = torch.full((2, 1, 2, 2), torch.nan)
    y = reference.batch_norm_relu(x, None, None, torch.zeros(1), torch.ones(1), False, 0.1, 1e-3)
    assert y.isnan().all()


def test_conv_bn_relu():
    x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
    statistics = (torch.zeros(4), torch.ones(4))
    y = reference.conv_bn_relu(x, w, None, None, *statistics, False, 0.1, 1e-3, stride=2, padding=1)
    torch.testing.assert_close(y, F.conv2d(x, w, stride=2, padding=1).relu() / 1.001**0.5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("branch3_kernel_size", [3, 5])
def test_inception_is_the_module(training, branch3_kernel_size):
    torch.manual_seed(1)
    module = Inception(16, 8, 12, 24, 6, 10, 8, branch3_kernel_size=branch3_kernel_size).double()
    module.train(training)
    convs = [
        module.branch1,
        *module.branch2,
        *module.branch3,
        module.branch4[1],
    ]
    norms = [conv.bn for conv in convs]
    statistics = [[getattr(bn, k).clone() for bn in norms] for k in ("running_mean", "running_var")]
    x = torch.randn(3, 16, 9, 8, dtype=torch.float64)
    y = reference.inception(
        x,
        [conv.conv.weight for conv in convs],
        [bn.weight for bn in norms],
        [bn.bias for bn in norms],
        *statistics,
        training,
        0.1,
        1e-3,
    )
    torch.testing.assert_close(y, module(x))
    for bn, mean, var in zip(norms, *statistics, strict=True):
        torch.testing.assert_close(bn.running_mean, mean)
        torch.testing.assert_close(bn.running_var, var)


def test_lrn():
    x = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    y = reference.lrn(x, size=5, alpha=0.3, beta=0.75, k=2.0)
    for c in range(7):
        around = x[:, max(c - 2, 0) : c + 3].square().sum(1)
        torch.testing.assert_close(y[:, c], x[:, c] / (2.0 + 0.3 / 5 * around) ** 0.75)


@pytest.mark.parametrize("size", [(14, 14), (4, 4), (1, 1), (2, 9), (15, 3)], ids=str)
def test_aux_pool_is_the_adaptive_pool(size):
    x = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    y = reference.aux_pool(x)
    expected = F.adaptive_avg_pool2d(x, 4)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (y, expected)))
    assert reference.aux_pool(x[:0]).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride", "padding"), [(3, 1, 1), (3, 2, 0), (2, 2, 0)])
def test_max_pool(kernel_size, stride, padding, ceil_mode):
    """Against windows cut out one by one."""
    x = torch.randn(2, 3, 7, 10)
    y = reference.max_pool(x, kernel_size, stride, padding, ceil_mode)
    padded = F.pad(x, [padding] * 2 + [padding] * 2, value=-torch.inf)
    for p in range(y.shape[2]):
        for q in range(y.shape[3]):
            top, left = p * stride, q * stride
            window = padded[:, :, top : top + kernel_size, left : left + kernel_size]
            assert torch.equal(y[:, :, p, q], window.amax((2, 3)))
    extra = (stride - 1) * ceil_mode
    assert y.shape[2:] == tuple(
        (n + 2 * padding - kernel_size + extra) // stride + 1 for n in (7, 10)
    )


def test_max_pool_gradient_goes_to_the_first_of_equals():
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    reference.max_pool(x, 3, 1).sum().backward()
    assert x.grad.flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_max_pool_nan_wins():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    x[0, 0, 0, 1] = torch.nan
    assert reference.max_pool(x, 3, 1).isnan().all()


def test_gradcheck():
    torch.manual_seed(2)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    gamma, beta = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def conv_bn_relu(x, w, gamma, beta):
        return reference.conv_bn_relu(x, w, gamma, beta, None, None, True, 0.1, 1e-3, padding=1)

    assert torch.autograd.gradcheck(conv_bn_relu, (x, w, gamma, beta))
    assert torch.autograd.gradgradcheck(conv_bn_relu, (x, w, gamma, beta))
    for op in (lambda x: reference.max_pool(x, 3, 2, 1, True), reference.lrn, reference.aux_pool):
        assert torch.autograd.gradcheck(op, (x,))
