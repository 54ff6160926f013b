"""What the tests of a user's doings with a GoogLeNet share."""

import torch
from closeness import assert_network_as_good_as_eager

import inception_ext

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(11))
LABELS = torch.tensor([3, 7])


def in_dtype_of(model, x):
    return x.to(next(model.parameters()).dtype, copy=True)


def assert_same_training(trio, images=IMAGES):
    """Outputs, gradients and buffers of one forward and backward pass agree."""
    results = []
    for model in trio:
        outputs = model(in_dtype_of(model, images))
        inception_ext.GoogLeNetLoss()(outputs, LABELS).backward()
        grads = {f"{k}.grad": p.grad for k, p in model.named_parameters() if p.grad is not None}
        outputs = {k: v.detach() for k, v in outputs._asdict().items()}
        results.append(outputs | grads | dict(model.named_buffers()))
    assert_network_as_good_as_eager(*results)


def assert_same_inference(trio, images=IMAGES):
    with torch.no_grad():
        assert_network_as_good_as_eager(
            *({"logits": model.eval()(in_dtype_of(model, images))} for model in trio)
        )
