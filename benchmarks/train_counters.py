"""What a training step of GoogLeNet does on the CUDA kernels, counted as ``counters.py`` counts.

Forward and backward of the network without auxiliary heads and optimizer, weights in the dtype of
the activations, channels_last. The average pool, dropout, the linear layer and the loss are torch's
and not counted: 0.3 MB an image.

forward_launches_per_module    kernels of one Inception module
backward_launches_per_module
train_bytes_touched_per_image  bytes that must cross device memory: each once a launch, read and
                               written apart; without weights and what has their size (their
                               gradients, their partial sums, vectors of channels)
weight_bytes_per_step          those: they do not grow with the batch
saved_bytes_per_image          what autograd keeps from forward to backward, without parameters
bitwise_repeatable             whether two steps in different orders of execution give equal bits
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_ext import googlenet
from inception_ext.testing import emulated

# Operands that are not activations: their size is that of weights, or of vectors of channels.
OF_WEIGHTS = (
    *("conv_weight", "weight", "packed", "dw", "sums", "counters"),
    *("gamma", "beta", "dgamma", "dbeta", "mean", "rstd", "running", "bias", "dbias"),
)


def count(batch: int, dtype: torch.dtype, size: int = 224, seed: int = 0) -> dict[str, Any]:
    """The counters of one step over random images."""
    torch.manual_seed(seed)
    model = googlenet(num_classes=1000, aux_logits=False, init_weights=True, dropout=0.0)
    model = model.to(dtype).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size).to(dtype).to(memory_format=torch.channels_last)
    saved = SavedBytes(model)
    with emulated(seed=seed, checks=False) as launches, saved:
        first = step(model, images)
    with emulated(seed=seed + 1, checks=False, counting=False):
        second = step(model, images)
    repeats = all(torch.equal(first[name], values) for name, values in second.items())
    return summarize(launches, batch) | {
        "saved_bytes_per_image": saved.total / batch,
        "bitwise_repeatable": repeats,
    }


def step(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits and gradients; the model's statistics stay as they were."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logits = model(images)
    loss = F.cross_entropy(logits.float(), torch.arange(len(images)) % logits.shape[1])
    loss.backward()
    results = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        results[name] = parameter.grad
        parameter.grad = None
    model.load_state_dict(state)
    return results


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Within it, ``total`` adds up the storages that autograd saves, each once, but parameters'."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        self._kept: list[Tensor] = []  # so that no address comes twice
        self.total = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor)
            self.total += storage.nbytes()
        return tensor


def summarize(launches: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """What can be told from the launches."""
    by_op = Counter(launch["op"] for launch in launches)
    activations, weights = 0, 0
    megabytes: Counter[str] = Counter()
    for launch in launches:
        for part in launch["touched"]:
            size = part["read"] + part["written"]
            if part["operand"].startswith(OF_WEIGHTS):
                weights += size
            else:
                activations += size
                megabytes[launch["op"]] += size
    conflicts: Counter[str] = Counter()
    for launch in launches:
        conflicts.update(launch["conflict_places"])
    modules = 9
    return {
        "launches": len(launches),
        "forward_launches_per_module": by_op["inception_forward"] / modules,
        "backward_launches_per_module": by_op["inception_backward"] / modules,
        "train_bytes_touched_per_image": activations / batch,
        "weight_bytes_per_step": weights,
        "bytes_issued_per_image": sum(
            launch["bytes_read"] + launch["bytes_written"] for launch in launches
        )
        / batch,
        "useful_mac_share": sum(launch["useful_macs"] for launch in launches)
        / sum(launch["issued_macs"] for launch in launches),
        "bank_conflicts": sum(launch["bank_conflicts"] for launch in launches),
        "bank_conflict_places": dict(conflicts),
        "bytes_touched_per_image_by_op": {op: size / batch for op, size in megabytes.items()},
    }
