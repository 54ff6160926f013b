"""inception_ext.GoogLeNet computes what torchvision.models.GoogLeNet computes."""

import pytest
import torch
from closeness import (
    BLOCK_NOISE_FLOOR,
    NETWORK_TOLERANCE,
    assert_all_as_good_as_eager,
    assert_network_as_good_as_eager,
)
from torch import nn

import inception_ext

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def build_seeded(library, **kwargs):
    torch.manual_seed(1234)
    return library.googlenet(init_weights=True, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "parameters", "keys"),
    [({}, 13_004_888, 364), ({"aux_logits": False}, 6_624_904, 344)],
    ids=["with heads", "without heads"],
)
def test_seeded_init_is_equal_bit_for_bit(tv_googlenet, kwargs, parameters, keys):
    ours = build_seeded(inception_ext, **kwargs)
    theirs = build_seeded(tv_googlenet, **kwargs)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert len(ours.state_dict()) == keys
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_modules_have_torchvisions_names_order_and_settings(tv_googlenet):
    ours = build_seeded(inception_ext)
    theirs = build_seeded(tv_googlenet)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]
    for (name, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if not list(b.children()):
            assert repr(a) == repr(b), name


def test_blocks_have_torchvisions_positional_arguments(tv_googlenet):
    for library in (inception_ext, tv_googlenet):
        block = library.Inception(16, 8, 4, 8, 4, 8, 8, library.BasicConv2d)
        aux = library.InceptionAux(16, 5, library.BasicConv2d, 0.5)
        assert block(torch.randn(2, 16, 7, 7)).shape == (2, 32, 7, 7)
        assert aux(torch.randn(2, 16, 7, 7)).shape == (2, 5)
        assert aux.dropout.p == 0.5


@pytest.mark.parametrize("aux_logits", [True, False])
def test_state_dict_loads_both_ways(tv_googlenet, aux_logits):
    ours = inception_ext.googlenet(init_weights=True, aux_logits=aux_logits)
    theirs = tv_googlenet.googlenet(init_weights=True, aux_logits=aux_logits)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    tv_googlenet.googlenet(init_weights=False, aux_logits=aux_logits).load_state_dict(
        ours.state_dict(), strict=True
    )


def step(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that one training step computes, by name."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = model(images)
    target = torch.arange(len(images)) % 10
    inception_ext.GoogLeNetLoss()(outputs, target).backward()
    return (
        {name: value.detach() for name, value in outputs._asdict().items()}
        | {f"{name}.grad": p.grad for name, p in model.named_parameters()}
        | {"images.grad": images.grad}
        | dict(model.named_buffers())
    )


# Each size, batch, dtype and layout of the support matrix, in both modes; not their product.
TRAIN = [
    (5, (15, 15), torch.float32, "nchw"),
    (5, (33, 47), torch.float32, "nhwc"),
    (1, (64, 64), torch.float32, "nhwc"),
    (5, (64, 64), torch.bfloat16, "nchw"),
    (2, (64, 64), torch.float64, "nhwc"),
    (2, (224, 224), torch.float32, "nchw"),
    (2, (224, 224), torch.bfloat16, "nhwc"),
    (2, (225, 223), torch.float32, "nhwc"),
    (0, (64, 64), torch.float32, "nhwc"),
]
EVAL = [
    (1, (15, 15), torch.float32, "nhwc"),
    (2, (15, 15), torch.float64, "nchw"),
    (5, (33, 47), torch.bfloat16, "nchw"),
    (5, (64, 64), torch.float32, "nchw"),
    (2, (64, 64), torch.bfloat16, "nhwc"),
    (1, (224, 224), torch.float32, "nhwc"),
    (2, (224, 224), torch.bfloat16, "nchw"),
    (1, (225, 223), torch.float64, "nhwc"),
    (2, (225, 223), torch.float32, "nchw"),
    (0, (224, 224), torch.bfloat16, "nhwc"),
]


def case_id(case: object) -> str:
    if isinstance(case, tuple):
        return "x".join(map(str, case))
    return str(case).removeprefix("torch.")


@pytest.fixture
def trio(make_pair):
    """Makes (ours, torchvision's, torchvision's in float64) and images for each."""

    def make(n, size, dtype, layout, **kwargs):
        torch.manual_seed(n + size[0])
        memory_format = LAYOUTS[layout]
        images = torch.randn(n, 3, *size).to(dtype).to(memory_format=memory_format)
        models = (*make_pair(dtype, **kwargs), make_pair(torch.float64, **kwargs)[1])
        for model in models:
            # The reference starts from the parameters as rounded to the dtype under test.
            model.load_state_dict(models[0].state_dict())
            model.to(memory_format=memory_format)
        return models, (images, images, images.double())

    return make


@pytest.mark.parametrize(("n", "size", "dtype", "layout"), TRAIN, ids=case_id)
def test_training_step(trio, n, size, dtype, layout):
    models, images = trio(n, size, dtype, layout)
    if n == 0:  # the loss of nothing is NaN: compare what there is to compare
        for model, x in zip(models, images, strict=True):
            x.requires_grad_()
            outputs = model(x)
            assert [tuple(o.shape) for o in outputs] == [(0, 10)] * 3
            sum(o.sum() for o in outputs).backward()
            assert x.grad.shape == x.shape
        ours, theirs, _ = models
        for (name, a), (_, b) in zip(
            ours.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert torch.equal(a.grad, b.grad), name
        for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.equal(a, b), name
        return
    assert_network_as_good_as_eager(*(step(m, x) for m, x in zip(models, images, strict=True)))


@pytest.mark.parametrize(("n", "size", "dtype", "layout"), EVAL, ids=case_id)
def test_inference(trio, n, size, dtype, layout):
    models, images = trio(n, size, dtype, layout)
    with torch.no_grad():
        results = [{"logits": m.eval()(x)} for m, x in zip(models, images, strict=True)]
    assert_network_as_good_as_eager(*results)


def test_gradients_in_eval_mode(trio):
    models, images = trio(2, (64, 64), torch.float32, "nhwc")
    results = []
    for model, x in zip(models, images, strict=True):
        x = x.clone().requires_grad_()
        model.eval()(x).square().sum().backward()
        grads = {f"{k}.grad": p.grad for k, p in model.named_parameters() if p.grad is not None}
        results.append(grads | {"images.grad": x.grad})
    assert_network_as_good_as_eager(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transform_input(trio, layout):
    models, images = trio(2, (64, 64), torch.float32, layout, transform_input=True)
    with torch.no_grad():
        results = [{"logits": m.eval()(x)} for m, x in zip(models, images, strict=True)]
    assert_network_as_good_as_eager(*results)


def test_dropout_draws_the_same_numbers(make_pair):
    """Seeded alike, both zero the same units, in the heads and in front of the classifier."""
    images = torch.randn(4, 3, 64, 64)
    results = []
    for model in make_pair(dropout=0.2, dropout_aux=0.7):
        torch.manual_seed(7)
        results.append(model(images))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **NETWORK_TOLERANCE)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_autocast(make_pair, autocast_dtype):
    ours, theirs = make_pair()
    reference = make_pair(torch.float64)[1]
    images = torch.randn(2, 3, 64, 64)
    results = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=autocast_dtype):
            results.append(model(images)._asdict())
    results.append(reference(images.double())._asdict())
    assert_network_as_good_as_eager(*results)


BLOCKS = {
    "stem": ("BasicConv2d", (3, 64), {"kernel_size": 7, "stride": 2, "padding": 3}, (2, 64, 64)),
    "1x1": ("BasicConv2d", (16, 24), {"kernel_size": 1}, (3, 9, 11)),
    "3x3": ("BasicConv2d", (13, 7), {"kernel_size": 3, "padding": 1}, (3, 9, 11)),
    "odd widths": ("Inception", (15, 5, 3, 7, 1, 9, 11), {}, (3, 9, 11)),
    "3a": ("Inception", (192, 64, 96, 128, 16, 32, 32), {}, (2, 28, 28)),
    "4b": ("Inception", (512, 160, 112, 224, 24, 64, 64), {}, (1, 14, 14)),
    "5b": ("Inception", (832, 384, 192, 384, 48, 128, 128), {}, (5, 7, 7)),
    "one row": ("Inception", (16, 8, 12, 24, 6, 10, 8), {}, (4, 1, 5)),
    "aux": ("InceptionAux", (512, 10), {"dropout": 0.0}, (5, 14, 14)),
    "aux, small map": ("InceptionAux", (16, 7), {"dropout": 0.0}, (5, 2, 3)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_alone(tv_googlenet, block, dtype, layout, training):
    kind, arguments, keywords, (n, height, width) = BLOCKS[block]
    torch.manual_seed(5)
    images = torch.randn(n, arguments[0], height, width).to(dtype)
    template = getattr(tv_googlenet, kind)(*arguments, **keywords)
    for module in template.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.1, 0.5)
    template.to(dtype)
    upstream = None

    results = []
    for library, run_dtype in (
        (inception_ext, dtype),
        (tv_googlenet, dtype),
        (tv_googlenet, torch.float64),
    ):
        module = getattr(library, kind)(*arguments, **keywords).train(training)
        module.to(dtype).load_state_dict(template.state_dict())
        module.to(run_dtype, memory_format=LAYOUTS[layout])
        x = images.to(run_dtype, memory_format=LAYOUTS[layout], copy=True).requires_grad_()
        y = module(x)
        upstream = torch.randn_like(y).to(dtype) if upstream is None else upstream
        y.backward(upstream.to(run_dtype))
        grads = {f"{name}.grad": p.grad for name, p in module.named_parameters()}
        results.append({"y": y.detach(), "x.grad": x.grad} | grads | dict(module.named_buffers()))
    if dtype == torch.float32:
        assert_all_as_good_as_eager(*results, noise_floor=BLOCK_NOISE_FLOOR)
    else:
        assert_network_as_good_as_eager(*results)
