"""Ten steps of SGD on the CUDA kernels: as near to float64 as eager in the same dtype is.

Rounding errors are to differ in size alone. So each channel is active or is not, wherever one
looks: no rounding error decides a ReLU. It may still decide a max pool, which moves gradients by
more than all other errors together, on either side: several seeds are judged together, and after
ten steps, when that has spread, all parameters, statistics and outputs of a seed are as well.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from closeness import BLOCK_NOISE_FLOOR, NEGLIGIBLE, NOISE_FLOOR_EPS
from fast_path import randn
from kernel_devices import each_device, exact_products, kernels_on, torch_device
from torch import Tensor, nn

from inception_ext import functional
from inception_ext.modules import BasicConv2d, Inception, conv_chain

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = range(5)
CLASSES = 10
OPS = {f"{op}_{way}" for op in ("conv_chain", "inception") for way in ("forward", "backward")}


class Network(nn.Module):
    """GoogLeNet in small: the stem, two modules, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3)
        self.conv2 = BasicConv2d(16, 16, kernel_size=1)
        self.conv3 = BasicConv2d(16, 24, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception1 = Inception(24, 16, 8, 24, 8, 16, 8)
        self.inception2 = Inception(64, 24, 16, 32, 8, 16, 16)
        self.fc = nn.Linear(88, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_chain([self.conv1], self.pool, x)
        x = conv_chain([self.conv2, self.conv3], self.pool, x)
        return self.fc(self.inception2(self.inception1(x)).mean((2, 3)))


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    net = Network()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for i, bn in enumerate(norms):
        with torch.no_grad():
            bn.weight.uniform_(0.5, 1)
            bn.bias.copy_(torch.where(torch.arange(bn.num_features) % 3 == i % 3, -6.0, 6.0))
    return net


def of_dtype(net: Network, dtype: torch.dtype) -> Network:
    """With batch norms in float32 at least, as mixed precision has them."""
    net = copy.deepcopy(net).to(dtype)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.to(torch.promote_types(dtype, torch.float32))
    return net


def state(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: values.detach().double().cpu().clone()
        for name, values in net.state_dict().items()
        if values.is_floating_point()
    }


def train(net: Network, x: Tensor, labels: Tensor) -> dict[int, dict[str, Tensor]]:
    """After 1 and after 10 steps: the last output, and how parameters and statistics changed."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    before, results = state(net), {}
    for step in range(1, 11):
        optimizer.zero_grad()
        y = net(x)
        F.cross_entropy(y.to(torch.promote_types(y.dtype, torch.float32)), labels).backward()
        optimizer.step()
        if step in (1, 10):
            changes = {name: values - before[name] for name, values in state(net).items()}
            results[step] = {"output": y.detach().double().cpu()} | changes
    return results


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def errors_of(
    ours: dict[str, Tensor], exact: dict[str, Tensor], parameters: list[str]
) -> dict[str, float]:
    """Root mean squares, relative.

    What the next batch norm takes away again moves no loss: a bias in front of a 1x1 convolution.
    Its change is 0 but for rounding, and is measured by a part of the largest change.
    """
    least = NEGLIGIBLE * max(rms(exact[name]) for name in parameters)
    scales = {name: max(rms(values), least) for name, values in exact.items()}
    return {name: rms(ours[name] - values) / scales[name] for name, values in exact.items()}


@each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_ten_steps(device, dtype):
    errors: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for seed in SEEDS:
        net = of_dtype(network(seed), dtype)
        x = randn(4, 3, 32, 32, seed=seed).to(dtype).to(memory_format=torch.channels_last)
        labels = torch.arange(4) + seed
        place = torch_device(device)
        with exact_products(), kernels_on(device, seed=seed, checks=False) as launches:
            ours = train(copy.deepcopy(net).to(place), x.to(place), labels.to(place))
        assert device != "emulator" or {launch["op"] for launch in launches} == OPS
        with functional.use_kernels(False):
            eager = train(copy.deepcopy(net), x, labels)
            exact = train(of_dtype(net, torch.float64), x.double(), labels)
        names = [name for name, _ in net.named_parameters()]
        for step, results in exact.items():
            sides = [errors_of(side[step], results, names) for side in (ours, eager)]
            for name in results:
                key = (step, name if step == 1 else "all")
                errors.setdefault(key, []).append((sides[0][name], sides[1][name]))
    floor = (
        BLOCK_NOISE_FLOOR if dtype == torch.float32 else NOISE_FLOOR_EPS * torch.finfo(dtype).eps
    )
    for (step, name), pairs in errors.items():
        of_ours, of_eager = torch.tensor(pairs).square().mean(0).sqrt().tolist()
        assert of_ours <= 2 * of_eager + floor, f"{name} after {step} steps: {pairs}"
