"""inception_ext.GoogLeNet does what PyTorch users do with torchvision's."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from behaviour_cases import IMAGES, LABELS, assert_same_inference, assert_same_training, in_dtype_of
from closeness import NETWORK_TOLERANCE, assert_network_as_good_as_eager
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import inception_ext

# Copies and dtypes


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies_are_equal_and_independent(make_pair, clone):
    model = make_pair()[0].eval()
    twin = clone(model)
    expected = model(IMAGES)
    assert torch.equal(twin(IMAGES), expected)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    assert torch.equal(model(IMAGES), expected)


def test_copies_before_and_after_training_steps(make_pair):
    model = make_pair()[0]
    model(IMAGES).logits.sum().backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IMAGES).logits, model(IMAGES).logits)


def test_torch_save(make_pair):
    model = make_pair()[0].eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = inception_ext.GoogLeNet(10, init_weights=False).eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(IMAGES), model(IMAGES))

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(IMAGES), model(IMAGES))


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_dtypes(trio, convert):
    ours, theirs, reference = trio
    getattr(ours, convert)()
    getattr(theirs, convert)()
    reference.load_state_dict(theirs.state_dict())
    images = in_dtype_of(ours, IMAGES).double()
    assert_same_inference((ours, theirs, reference), images)


def test_meta_device():
    with torch.device("meta"):
        model = inception_ext.GoogLeNet(10, init_weights=True)
    outputs = model(torch.empty(2, 3, 64, 64, device="meta"))
    assert [tuple(o.shape) for o in outputs] == [(2, 10)] * 3
    assert model.eval()(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
    assert not any(p.is_meta for p in model.to_empty(device="cpu").parameters())


def test_channels_last_stays(make_pair):
    model = make_pair(transform_input=True)[0].eval().to(memory_format=torch.channels_last)
    images = IMAGES.to(memory_format=torch.channels_last)
    seen = []
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.inception5b.register_forward_hook(lambda _, __, output: seen.append(output))
    model(images)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert torch.equal(model._transform_input(images), model._transform_input(IMAGES))
    assert model._transform_input(IMAGES).is_contiguous()


# Hooks and rebuilt modules


def test_hooks_on_every_submodule(make_pair):
    """Forward hooks fire in torchvision's order; backward hooks, which torchvision's ReLU in place
    does not even allow, see every module once."""
    called = []
    for model in make_pair():
        order = []
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, n=name, o=order: o.append(n))
            module.register_forward_pre_hook(lambda *_, n=name, o=order: o.append(n))
        model(IMAGES)
        called.append(order)
    assert called[0] == called[1]

    model, _ = make_pair()
    order = []
    modules = dict(model.named_modules())
    for name, module in modules.items():
        module.register_full_backward_hook(lambda *_, n=name, o=order: o.append(n))
    inception_ext.GoogLeNetLoss()(model(IMAGES), LABELS).backward()
    assert sorted(order) == sorted(modules)


def test_a_hook_sees_and_changes_what_flows(make_pair):
    def double_it(_, __, output):
        return output * 2

    results = []
    for model in make_pair():
        model.eval()
        model.inception4a.branch2[0].bn.register_forward_hook(double_it)
        model.inception4b.branch4[0].register_forward_hook(double_it)
        model.maxpool2.register_forward_hook(double_it)
        results.append(model(IMAGES))
    torch.testing.assert_close(*results, **NETWORK_TOLERANCE)


def test_global_hooks(make_pair):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        make_pair()[0](IMAGES)
    finally:
        handle.remove()
    assert (seen.count(nn.Conv2d), seen.count(nn.MaxPool2d)) == (59, 13)


def test_hooked_batch_norm_output_is_kept(make_pair):
    """ReLU does not overwrite what a hook holds on to."""
    model = make_pair()[0].eval()
    seen = []
    model.inception3a.branch1.bn.register_forward_hook(lambda _, __, y: seen.append(y))
    model(IMAGES)
    assert (seen[0] < 0).any()


def test_sync_batch_norm_conversion(trio):
    converted = [nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in trio]
    assert isinstance(converted[0].inception3a.branch1.bn, nn.SyncBatchNorm)
    assert_same_inference(converted)


def test_pruning(trio):
    for model in trio:
        prune.l1_unstructured(model.inception4a.branch2[1].conv, "weight", amount=0.5)
        prune.ln_structured(model.conv3.conv, "weight", amount=0.25, n=2, dim=0)
    assert_same_training(trio)
    prune.remove(trio[0].conv3.conv, "weight")
    assert (trio[0].conv3.conv.weight == 0).flatten(1).all(1).sum() == 48


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def test_parametrizations(trio):
    for model in trio:
        parametrize.register_parametrization(model.inception4a.branch3[1].conv, "weight", Halved())
        parametrize.register_parametrization(model.inception4e.branch4[1].bn, "weight", Halved())
        nn.utils.parametrizations.weight_norm(model.inception5a.branch1.conv)
    assert_same_training(trio)


def test_replaced_children(trio):
    for model in trio:
        torch.manual_seed(4)
        model.inception3a.branch2[1].bn = nn.GroupNorm(8, 128)
        model.inception4a.branch4[0] = nn.AvgPool2d(3, stride=1, padding=1)
        model.inception4b.branch1 = nn.Sequential(nn.Conv2d(512, 160, 1), nn.Sigmoid())
        model.inception5a.branch3.append(nn.Dropout(0.0))
        model.maxpool3 = nn.AvgPool2d(2, stride=2)
        model.to(next(model.conv1.parameters()).dtype)
    assert_same_training(trio)


def test_replaced_fc(trio):
    for model in trio:
        torch.manual_seed(4)
        model.fc = nn.Linear(1024, 10).to(next(model.parameters()).dtype)
    assert_same_training(trio)


# Training modes


def test_frozen_batch_norm_in_training(trio):
    for model in trio:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    before = trio[0].conv1.bn.running_mean.clone()
    assert_same_training(trio)
    assert torch.equal(trio[0].conv1.bn.running_mean, before)


def test_some_frozen_batch_norms(trio):
    for model in trio:
        model.inception3a.branch1.bn.eval()
        model.inception4c.branch3[0].bn.eval()
        model.inception5b.branch4[1].bn.eval()
    assert_same_training(trio)


def test_freeze_all_but_fc(trio):
    for model in trio:
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
    assert_same_training(trio)
    assert [k for k, p in trio[0].named_parameters() if p.grad is not None] == [
        "fc.weight",
        "fc.bias",
    ]


def test_some_frozen_parameters(trio):
    for model in trio:
        model.inception3a.branch1.conv.weight.requires_grad_(False)
        model.inception4a.branch2[0].bn.weight.requires_grad_(False)
        model.inception4a.branch3[1].bn.bias.requires_grad_(False)
        model.inception5a.requires_grad_(False)
        model.conv1.requires_grad_(False)
    assert_same_training(trio)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": None},
        {"momentum": 1.0},
        {"momentum": 0.0},
        {"eps": 0.1},
        {"track_running_stats": False, "running_mean": None, "running_var": None},
    ],
    ids=str,
)
def test_batch_norm_settings(trio, settings):
    for model in trio:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for name, value in settings.items():
                    setattr(module, name, value)
    assert_same_training(trio)
    assert_same_training(trio, IMAGES.flip(0) * 3)
    assert_same_inference(trio)


def test_batch_norm_without_affine_or_tracking(trio):
    for model in trio:
        for block in (model.conv2, model.inception3a.branch1, model.inception4e.branch2[0]):
            settings = {"eps": 1e-3, "affine": False, "track_running_stats": False}
            block.bn = nn.BatchNorm2d(block.bn.num_features, **settings)
    assert_same_training(trio)
    assert_same_inference(trio)


def test_inference_mode(trio):
    with torch.inference_mode():
        assert trio[0].eval()(IMAGES).is_inference()
    assert_same_inference(trio)


def test_changed_parameters_are_noticed(trio):
    """Results in eval mode follow the parameters, however they change."""
    changes = [
        lambda m: m.conv3.bn.running_mean.add_(0.5),
        lambda m: m.inception3a.branch1.conv.weight.mul_(1.5),
        lambda m: m.inception5b.branch2[1].bn.weight.data.mul_(0.5),
        lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
        lambda m: m.train()(in_dtype_of(m, IMAGES)),
    ]
    for change in changes:
        with torch.no_grad():
            for model in trio:
                change(model)
        assert_same_inference(trio)


def test_checkpointing(trio):
    results = []
    for model in trio:
        model.eval()
        blocks = [model.inception3a, model.inception3b, model.inception4a]
        for block in blocks if model is trio[0] else []:
            block.forward = lambda x, f=block.forward: checkpoint(f, x, use_reentrant=False)
        x = in_dtype_of(model, IMAGES).requires_grad_()
        F.cross_entropy(model(x), LABELS).backward()
        weights = {f"{i}.grad": b.branch2[0].conv.weight.grad for i, b in enumerate(blocks)}
        results.append(weights | {"x.grad": x.grad})
    assert_network_as_good_as_eager(*results)


def test_two_backward_passes_over_one_graph(make_pair):
    model = make_pair()[0]
    loss = model(IMAGES).logits.sum()
    loss.backward(retain_graph=True)
    once = model.conv1.conv.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.conv1.conv.weight.grad, 2 * once)


def test_ddp_in_one_process(make_pair, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, _ = make_pair()
        wrapped = nn.parallel.DistributedDataParallel(make_pair()[0])
        for model in (plain, wrapped):
            outputs = model(IMAGES)
            assert isinstance(outputs, inception_ext.GoogLeNetOutputs)
            inception_ext.GoogLeNetLoss()(outputs, LABELS).backward()
        for (name, a), b in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    finally:
        dist.destroy_process_group()


# Special values and shapes


def test_nan_poisons_its_own_image_only(make_pair):
    model = make_pair()[0].eval()
    images = torch.cat([IMAGES, IMAGES])
    expected = model(images)
    images[1, 2, 30, 41] = torch.nan
    outputs = model(images)
    assert outputs[1].isnan().all()
    torch.testing.assert_close(outputs[[0, 2, 3]], expected[[0, 2, 3]], **NETWORK_TOLERANCE)


def test_infinities_and_ties(trio):
    images = IMAGES.round()  # plateaus, whose maxima are ties
    images[0, :, 20:40] = 0
    assert_same_training(trio, images)
    images[0, 0, 0, 0] = -torch.inf
    results = [model.eval()(in_dtype_of(model, images)) for model in trio]
    assert torch.equal(results[0].isnan(), results[1].isnan())


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: torch.cat([x, x], 3)[..., 1:65],
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
        lambda x: torch.cat([x, x], 1).to(memory_format=torch.channels_last)[:, 1:4],
        lambda x: x.flip(2),
    ],
    ids=["sliced", "transposed", "expanded batch", "expanded channels", "nhwc slice", "flipped"],
)
def test_any_strides(trio, arrange):
    images = arrange(IMAGES)
    results = []
    for model in trio:
        x = in_dtype_of(model, images) if model is trio[2] else images
        x = x.detach().requires_grad_()
        model(x).logits.square().sum().backward()
        results.append({"x.grad": x.grad, "conv1.grad": model.conv1.conv.weight.grad})
    assert_network_as_good_as_eager(*results)


def test_deterministic_algorithms(trio):
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_training(trio)
    finally:
        torch.use_deterministic_algorithms(False)


def test_repeated_runs_are_equal(make_pair):
    model = make_pair()[0].eval()
    assert torch.equal(model(IMAGES), model(IMAGES))
