"""Every setting of a training run, and what follows from the settings alone."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

__all__ = ["Recipe", "make_optimizer"]


@dataclass(frozen=True)
class Recipe:
    """Plain values only, so that a checkpoint can hold it; names are those of torchvision's
    reference scripts, and ``python -m inception_ext train --help`` explains each."""

    # Data
    data: str | None = None
    synthetic: bool = False
    synthetic_size: int = 1024
    val_data: str | None = None
    val_share: float = 0.2
    num_classes: int | None = None
    samples_per_epoch: int | None = None
    batch_size: int = 32
    workers: int | None = None
    val_resize_size: int | None = None
    val_crop_size: int | None = None
    train_crop_size: int | None = None
    auto_augment: str | None = None
    random_erase: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    # Network
    variant: str = "torchvision"
    weights: str | None = None
    dropout: float | None = None
    dropout_aux: float = 0.7
    aux_weight: float = 0.3
    freeze_backbone: bool = False
    sync_bn: bool = False

    # Optimisation
    epochs: int = 90
    opt: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    label_smoothing: float = 0.0
    lr_scheduler: str = "cosineannealinglr"
    lr_warmup_epochs: float = 0.0
    lr_warmup_decay: float = 0.01
    lr_step_size: int = 30
    lr_gamma: float = 0.1
    lr_min: float = 0.0
    clip_grad_norm: float | None = None
    model_ema: bool = False
    model_ema_steps: int = 32
    model_ema_decay: float = 0.99998

    # How it runs
    device: str = "auto"
    amp: str | None = None
    channels_last: bool = True
    fused: bool = True
    compile: bool = False
    use_deterministic_algorithms: bool = False
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """A recipe out of a checkpoint; settings that this version does not know are dropped."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def learning_rate(self, epoch: float) -> float:
        """The learning rate at a moment; a fraction of an epoch counts.

        Linear from ``lr_warmup_decay * lr`` during the warm-up, then the schedule over the rest.
        """
        if epoch < self.lr_warmup_epochs:
            start = self.lr_warmup_decay
            return self.lr * (start + (1 - start) * epoch / self.lr_warmup_epochs)
        if self.lr_scheduler == "steplr":
            return self.lr * self.lr_gamma ** int(epoch // self.lr_step_size)
        if self.lr_scheduler == "exponentiallr":
            return self.lr * self.lr_gamma ** int(epoch)
        if self.lr_scheduler == "constant":
            return self.lr
        share = (epoch - self.lr_warmup_epochs) / max(self.epochs - self.lr_warmup_epochs, 1e-9)
        cosine = (1 + math.cos(math.pi * min(share, 1.0))) / 2
        return self.lr_min + (self.lr - self.lr_min) * cosine


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over all parameters that train, norms and biases with their own decay.

    ``norm_weight_decay`` is that of normalisation layers, ``bias_weight_decay`` that of the biases
    of all others; None means ``weight_decay``.
    """
    norms: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (norms if is_norm else biases if name == "bias" else others).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": recipe.weight_decay if decay is None else decay}
        for parameters, decay in (
            (others, None),
            (norms, recipe.norm_weight_decay),
            (biases, recipe.bias_weight_decay),
        )
        if parameters
    ]
    if recipe.opt == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.opt == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr=recipe.lr, momentum=recipe.momentum, eps=0.0316, alpha=0.9
        )
    nesterov = recipe.opt == "sgd_nesterov"
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
