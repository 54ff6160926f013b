"""The network, the images and the float64 results that every contestant is given."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from decisions import settle
from torch import Tensor, nn

__all__ = [
    "Workload",
    "decided_workload",
    "inference_workload",
    "torchvision_googlenet",
    "training_workload",
    "untuned",
]

SIZE = 224


def torchvision_googlenet() -> Callable[..., nn.Module]:
    """torchvision's own ``googlenet``, also beside a torch that its binary was not built for."""
    from inception_ext._torchvision import import_torchvision

    import_torchvision()
    from torchvision.models import googlenet

    return googlenet


@dataclass
class Workload:
    """One scenario's weights, inputs and right answers.

    Args:
        state_dict: of a GoogLeNet, float32, for torchvision's and ours alike.
        images: float32 ``[N, 3, size, size]``, contiguous, where the network is to run; calls
            rotate over them.
        labels: ``[N]`` int64 beside each; empty for inference.
        references: float64 results for the first images: logits ``[N, 1000]``, or for training
            ``[loss, gradient, gradient, ...]`` in the order of ``parameters()``.
        heads: whether the weights are those of a network with auxiliary heads.
    """

    state_dict: dict[str, Tensor]
    images: list[Tensor]
    labels: list[Tensor]
    references: Sequence[Tensor | list[Tensor]]
    heads: bool

    def model(self, build: Callable[..., nn.Module]) -> nn.Module:
        """A network from ``build`` (torchvision's or ours) with these weights.

        Dropout is off, so that training steps can be compared; it takes no measurable time.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(
                weights=None,
                aux_logits=self.heads,
                init_weights=False,
                transform_input=False,
                dropout=0.0,
                dropout_aux=0.0,
            )
        model.load_state_dict(self.state_dict)
        return model.to(self.images[0].device).train(self.heads)


def images(batch: int, count: int, *, seed: int, size: int = SIZE) -> list[Tensor]:
    """Smooth random pictures with some noise, about mean 0 and deviation 1: never zeros."""
    generator = torch.Generator().manual_seed(seed)

    def noise(side: int) -> Tensor:
        return torch.randn(batch, 3, side, side, generator=generator)

    def picture() -> Tensor:
        layers = (noise(7), noise(28))
        smooth = sum(F.interpolate(x, size=(size, size), mode="bicubic") for x in layers)
        return 0.7 * smooth + 0.2 * noise(size)

    return [picture() for _ in range(count)]


def seeded_weights(*, heads: bool, seed: int = 0) -> dict[str, Tensor]:
    """torchvision's initial weights with BatchNorm statistics fitted to random pictures.

    Without the fit, deviations shrink from layer to layer, and what reaches the classifier is
    next to nothing: no load that a trained network would cause.
    """
    from inception_ext import googlenet
    from inception_ext.functional import use_kernels

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = googlenet(aux_logits=heads, init_weights=True, dropout=0.0, dropout_aux=0.0)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average over all batches
        norm.reset_running_stats()
    with torch.no_grad(), use_kernels(False):
        for batch in images(8, 2, seed=seed + 1):
            model.train()(batch)
        # Scales and shifts as after some training: a constant would be too easy to fold away.
        generator = torch.Generator().manual_seed(seed + 2)
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3, generator=generator)
            norm.bias.uniform_(-0.2, 0.2, generator=generator)
    return {key: value.clone() for key, value in model.state_dict().items()}


@contextmanager
def untuned() -> Iterator[None]:
    """cuDNN takes its first choice: for what runs once."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def inference_workload(
    state_dict: dict[str, Tensor],
    batch: int,
    *,
    size: int = SIZE,
    inputs: int = 4,
    checked: int = 2,
    device: str = "cpu",
    build: Callable[..., nn.Module] | None = None,
) -> Workload:
    """Logits of a network in eval mode, without heads; ``build`` makes it, by default ours."""
    pictures = [x.to(device) for x in images(batch, inputs, seed=100 + batch, size=size)]
    work = Workload(state_dict, pictures, [], [], heads=False)
    model = work.model(build or _ours()).double()
    with torch.no_grad(), untuned():
        work.references = [model(x.double()) for x in work.images[:checked]]
    return work


def training_workload(
    state_dict: dict[str, Tensor],
    batch: int,
    *,
    size: int = SIZE,
    inputs: int = 3,
    checked: int = 3,
    device: str = "cpu",
) -> Workload:
    """Loss and gradients of a training step with both heads."""
    pictures = [x.to(device) for x in images(batch, inputs, seed=200 + batch, size=size)]
    work = Workload(state_dict, pictures, _labels(pictures, 300 + batch), [], heads=True)
    work.references = [_step(work, i) for i in range(checked)]
    return work


def decided_workload(
    state_dict: dict[str, Tensor],
    *,
    batch: int = 2,
    size: int = 33,
    seed: int = 0,
    candidates: int = 8,
    device: str = "cpu",
) -> Workload:
    """A training step in which rounding decides no ReLU and no max pool, see :mod:`decisions`.

    Of as many batches as ``candidates`` it is the one whose max pools decide by the widest margin.
    """
    best, margin = None, 0.0
    for i in range(candidates):
        x = images(batch, 1, seed=1000 * seed + i, size=size)[0].to(device)
        work = Workload(state_dict, [x], _labels([x], 1000 * seed + i), [], heads=True)
        model = work.model(torchvision_googlenet()).double()
        with untuned():
            found = settle(model, x.double())
        if best is None or found > margin:
            best, margin = work, found
            shifts = {k: p for k, p in model.named_parameters() if k.endswith("bn.bias")}
            best.state_dict = state_dict | {k: p.detach().float() for k, p in shifts.items()}
    assert best is not None
    best.references = [_step(best, 0)]
    return best


def _labels(pictures: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1000, (len(x),), generator=generator).to(x.device) for x in pictures]


def _step(work: Workload, i: int) -> list[Tensor]:
    """Loss and gradients in float64."""
    from inception_ext import GoogLeNetLoss

    model = work.model(_ours()).double()
    with untuned():
        loss = GoogLeNetLoss()(model(work.images[i].double()), work.labels[i])
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def _ours() -> Callable[..., nn.Module]:
    from inception_ext import googlenet

    return googlenet
