"""GoogLeNet with both auxiliary heads learns real digits on the CUDA kernels as in plain PyTorch.

Training is chaotic: a rounding error that decides one ReLU grows from step to step, and two correct
runs part. How far, plain PyTorch tells of itself: its own runs, from weights that differ in the
last place, leave the curve of float64 by so much, and ours may leave it by twice that. Which is
less than what is learned, so that a network that learns nothing is found out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from kernel_devices import each_device, exact_products, kernels_on, torch_device
from torch import Tensor, nn
from training_cases import small_googlenet

import inception_ext
from inception_ext import functional
from inception_ext.cli._digits import load_digits

BATCH = 12
WINDOW = 10  # steps whose losses are averaged
EAGER_RUNS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that plain PyTorch adds up in the same order each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    """narrow: see :func:`training_cases.small_googlenet`."""

    steps: int
    narrow: int
    lr: float
    amp: torch.dtype | None = None

    def network(self, seed: int | None = None) -> nn.Module:
        """The same each time, but for a seed: weights are then their upper or lower neighbours."""
        torch.manual_seed(0)
        model = small_googlenet(self.narrow)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in model.parameters():
                    up = torch.rand(p.shape, generator=generator) < 0.5
                    p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))
        return model

    def curve(self, model: nn.Module, device: str, amp: torch.dtype | None) -> Tensor:
        """The losses of AdamW, one step a batch of digits, averaged over WINDOW steps."""
        model = model.to(device, memory_format=torch.channels_last)
        dtype = next(model.parameters()).dtype
        criterion = inception_ext.GoogLeNetLoss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.05)
        scaler = torch.amp.GradScaler(device, 2.0**10, growth_interval=10, enabled=amp is not None)
        digits = load_digits(size=32, seed=0)
        losses = []
        for i in range(self.steps):
            batch = slice(BATCH * i, BATCH * (i + 1))
            images, labels = digits.train_images[batch], digits.train_labels[batch]
            optimizer.zero_grad()
            with torch.autocast(device, amp, enabled=amp is not None):
                loss = criterion(model(images.to(device, dtype)), labels.to(device))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        return torch.tensor(losses, dtype=torch.float64).unfold(0, WINDOW, 1).mean(1)


@each_device
@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [Run(50, 4, 2e-3), Run(20, 4, 2e-3, torch.float16)], ids=["fp32", "fp16 amp"]
)
def test_the_loss_follows_eager(device, run):
    where = torch_device(device)
    with exact_products():
        with functional.use_kernels(False):
            truth = run.curve(run.network().double(), where, None)
            eager = [run.curve(run.network(i), where, run.amp) for i in range(EAGER_RUNS)]
        with kernels_on(device, checks=False, counting=False):
            ours = run.curve(run.network(), where, run.amp)
    spread = max((curve - truth).abs().max().item() for curve in eager)
    deviation = (ours - truth).abs().max().item()
    assert deviation <= 2 * spread, f"ours is off by {deviation:.3f}, eager by up to {spread:.3f}"
    learned = (truth[0] - truth[-1]).item()
    assert 2 * spread < learned, f"eager is off by {spread:.3f}, {learned:.3f} is learned"
