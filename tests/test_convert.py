"""accelerate(), restore() and load_compatible()."""

import copy
import io
import pickle

import pytest
import torch
from closeness import NETWORK_TOLERANCE, assert_network_as_good_as_eager
from torch import nn

import inception_ext
from inception_ext import LoadReport, accelerate, load_compatible, restore

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(12))
LABELS = torch.tensor([3, 7])


@pytest.fixture
def theirs(make_pair):
    return make_pair()[1]


def references_of(model):
    """Every object that others may hold on to: modules, parameters, buffers, hooks."""
    return [
        *model.modules(),
        *model.parameters(),
        *model.buffers(),
        *(hook for m in model.modules() for hook in m._forward_hooks.values()),
    ]


class TestAccelerate:
    def test_computes_the_same(self, make_pair):
        results = []
        for model in (
            accelerate(make_pair()[1]),
            make_pair()[1],
            make_pair(torch.float64)[1],
        ):
            outputs = model(IMAGES.to(model.fc.weight.dtype))
            inception_ext.GoogLeNetLoss()(outputs, LABELS).backward()
            grads = {f"{k}.grad": p.grad for k, p in model.named_parameters()}
            outputs = {k: v.detach() for k, v in outputs._asdict().items()}
            buffers = dict(model.named_buffers())
            logits = model.eval()(IMAGES.to(model.fc.weight.dtype)).detach()
            results.append(outputs | grads | buffers | {"eval": logits})
        assert_network_as_good_as_eager(*results)

    def test_swaps_all_blocks_and_only_them(self, theirs, tv_googlenet):
        others = {
            n: type(m) for n, m in theirs.named_modules() if type(m).__module__[:5] == "torch."
        }
        accelerate(theirs)
        ours = (inception_ext.GoogLeNet, inception_ext.Inception, inception_ext.BasicConv2d)
        for name, module in theirs.named_modules():
            if type(module).__module__.startswith("torch."):
                assert others.get(name, type(module)) is type(module)
            else:
                assert isinstance(module, (*ours, inception_ext.InceptionAux)), name
        assert isinstance(theirs, tv_googlenet.GoogLeNet)
        assert isinstance(theirs.inception3a, tv_googlenet.Inception)

    def test_everything_stays_the_same_object(self, theirs):
        theirs.inception3a.register_forward_hook(lambda *_: None)
        theirs.eval().inception4b.train()
        modes = [m.training for m in theirs.modules()]
        before, keys = references_of(theirs), list(theirs.state_dict())
        returned = accelerate(theirs)
        assert returned is theirs
        for a, b in zip(before, references_of(theirs), strict=True):
            assert a is b
        assert list(theirs.state_dict()) == keys
        assert [m.training for m in theirs.modules()] == modes

    def test_returns_torchvisions_outputs(self, theirs, tv_googlenet):
        assert type(accelerate(theirs)(IMAGES)) is tv_googlenet.GoogLeNetOutputs

    def test_an_optimizer_made_before_goes_on(self, theirs):
        optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
        accelerate(theirs)
        before = theirs.conv1.conv.weight.clone()
        inception_ext.GoogLeNetLoss()(theirs(IMAGES), LABELS).backward()
        optimizer.step()
        assert not torch.equal(theirs.conv1.conv.weight, before)

    def test_hooks_go_on(self, theirs):
        called = []
        theirs.inception3a.register_forward_hook(lambda *_: called.append("block"))
        theirs.inception3a.branch1.bn.register_forward_hook(lambda *_: called.append("bn"))
        theirs.register_forward_pre_hook(lambda *_: called.append("model"))
        accelerate(theirs)(IMAGES)
        assert called == ["model", "bn", "block"]

    def test_twice_is_once(self, theirs):
        accelerate(accelerate(theirs))
        classes = [type(m) for m in theirs.modules()]
        assert [type(m) for m in accelerate(theirs).modules()] == classes

    def test_a_model_within_another(self, theirs):
        outer = nn.Sequential(nn.Identity(), theirs)
        accelerate(outer)
        assert isinstance(theirs, inception_ext.GoogLeNet)

    def test_single_blocks(self, tv_googlenet):
        block = tv_googlenet.Inception(16, 8, 8, 8, 8, 8, 8)
        assert isinstance(accelerate(block), inception_ext.Inception)
        assert isinstance(block.branch1, inception_ext.BasicConv2d)

    def test_subclasses_keep_their_class(self, tv_googlenet):
        class Mine(tv_googlenet.GoogLeNet):
            def forward(self, x):
                return super().forward(x / 2)

        class MyBlock(tv_googlenet.Inception):
            def forward(self, x):
                return super().forward(x) * 2

        torch.manual_seed(0)
        model = Mine(10, init_weights=True)
        model.inception3a = MyBlock(192, 64, 96, 128, 16, 32, 32)
        expected = model.eval()(IMAGES)
        accelerate(model)
        assert type(model) is Mine
        assert type(model.inception3a) is MyBlock
        assert isinstance(model.inception3b, inception_ext.Inception)
        torch.testing.assert_close(model(IMAGES), expected, **NETWORK_TOLERANCE)
        restore(model)
        assert type(model.inception3b) is tv_googlenet.Inception

    def test_blocks_of_another_age_are_left(self, theirs, tv_googlenet):
        """Old torchvision's InceptionAux had no dropout module."""
        del theirs.aux1.dropout
        accelerate(theirs)
        assert type(theirs.aux1) is tv_googlenet.InceptionAux
        assert isinstance(theirs.aux2, inception_ext.InceptionAux)

    def test_without_heads(self, make_pair):
        model = accelerate(make_pair(aux_logits=False)[1])
        assert model(IMAGES).shape == (2, 10)

    def test_methods_of_ours_come_along(self, theirs):
        accelerate(theirs).reset_classifier(4)
        assert theirs(IMAGES).logits.shape == (2, 4)
        assert theirs.forward_features(IMAGES).shape[1] == theirs.num_features

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()], ids=type)
    def test_nothing_to_swap(self, model):
        with pytest.raises(ValueError, match=r"accelerate\(\) found no block of"):
            accelerate(model)

    def test_our_own_model(self):
        with pytest.raises(ValueError, match="built of inception_ext blocks already"):
            accelerate(inception_ext.GoogLeNet(5, init_weights=False))

    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_copies(self, theirs, way):
        accelerate(theirs).eval()
        if way == "deepcopy":
            twin = copy.deepcopy(theirs)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(theirs))
        else:
            file = io.BytesIO()
            torch.save(theirs, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert type(twin) is type(theirs)
        assert torch.equal(twin(IMAGES), theirs(IMAGES))
        assert twin.fc.weight is not theirs.fc.weight
        assert type(restore(twin)) is not type(theirs)

    def test_blocks_run_as_those_of_our_own_model(self, make_pair):
        ours, theirs = make_pair()
        accelerate(theirs)
        for name, module in ours.named_modules():
            assert theirs.get_submodule(name).extra_repr() == module.extra_repr(), name

    def test_compiles(self, theirs):
        expected = theirs.eval()(IMAGES)
        compiled = torch.compile(accelerate(theirs), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), expected, **NETWORK_TOLERANCE)

    def test_scripts(self, theirs):
        expected = theirs.eval()(IMAGES)
        outputs = torch.jit.script(accelerate(theirs))(IMAGES)
        torch.testing.assert_close(outputs.logits, expected, **NETWORK_TOLERANCE)

    def test_fx_node_names_stay(self, theirs):
        before = [n.name for n in torch.fx.symbolic_trace(theirs).graph.nodes]
        after = [n.name for n in torch.fx.symbolic_trace(accelerate(theirs)).graph.nodes]
        assert before == after


class TestRestore:
    def test_undoes_exactly(self, theirs):
        classes = [type(m) for m in theirs.modules()]
        contents = [dict(m.__dict__) for m in theirs.modules()]
        expected = theirs.eval()(IMAGES)
        assert restore(accelerate(theirs)) is theirs
        assert [type(m) for m in theirs.modules()] == classes
        for module, content in zip(theirs.modules(), contents, strict=True):
            assert module.__dict__.keys() == content.keys()
        assert torch.equal(theirs(IMAGES), expected)

    def test_leaves_other_models_alone(self, theirs):
        for model in (theirs, inception_ext.GoogLeNet(5, init_weights=False), nn.Linear(1, 1)):
            classes = [type(m) for m in model.modules()]
            assert restore(model) is model
            assert [type(m) for m in model.modules()] == classes


class TestLoadCompatible:
    @pytest.fixture
    def model(self):
        return inception_ext.GoogLeNet(10, init_weights=False)

    def test_everything_fits(self, model, theirs):
        report = load_compatible(model, theirs.state_dict())
        assert len(report.loaded) == 364
        assert not report.dropped and not report.newly_initialised
        for key, value in theirs.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)

    def test_other_number_of_classes(self, theirs):
        model = inception_ext.GoogLeNet(7, init_weights=False)
        fc = model.fc.weight.clone()
        report = load_compatible(model, theirs.state_dict())
        classifiers = [
            f"{n}.{p}" for n in ("aux1.fc2", "aux2.fc2", "fc") for p in ("weight", "bias")
        ]
        assert list(report.dropped) == report.newly_initialised == classifiers
        assert report.dropped["fc.weight"] == "shape [10, 1024], but [7, 1024] in the model"
        assert len(report.loaded) == 358
        assert torch.equal(model.fc.weight, fc)
        assert torch.equal(model.conv1.conv.weight, theirs.conv1.conv.weight)

    def test_heads_too_many_and_missing(self, theirs):
        without = inception_ext.GoogLeNet(10, aux_logits=False, init_weights=False)
        report = load_compatible(without, theirs.state_dict())
        assert set(report.dropped.values()) == {"not in the model"}
        assert len(report.dropped) == 20 and not report.newly_initialised

        model = inception_ext.GoogLeNet(10, init_weights=False)
        report = load_compatible(model, without.state_dict())
        assert not report.dropped
        assert len(report.newly_initialised) == 20
        assert all(key.startswith("aux") for key in report.newly_initialised)

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
    )
    def test_prefixes_come_off(self, model, theirs, prefix):
        report = load_compatible(model, {prefix + k: v for k, v in theirs.state_dict().items()})
        assert len(report.loaded) == 364 and not report.dropped
        assert torch.equal(model.fc.weight, theirs.fc.weight)

    def test_prefixes_stay_where_the_model_has_them(self, model):
        wrapped = nn.Module()
        wrapped.module = model
        report = load_compatible(wrapped, copy.deepcopy(wrapped.state_dict()))
        assert len(report.loaded) == 364

    def test_entries_that_are_no_tensors(self, model):
        report = load_compatible(model, {"fc.weight": "x", "fc.bias": torch.zeros(10), "epoch": 3})
        assert report.loaded == ["fc.bias"]
        assert report.dropped == {"fc.weight": "not a tensor", "epoch": "not in the model"}

    def test_other_dtypes_are_converted(self, model, theirs):
        expected = theirs.fc.weight.half().float()
        load_compatible(model, theirs.half().state_dict())
        assert model.fc.weight.dtype == torch.float32
        assert torch.equal(model.fc.weight, expected)

    def test_path(self, model, theirs, tmp_path):
        torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "last.pth")
        for path in (tmp_path / "last.pth", str(tmp_path / "last.pth")):
            assert len(load_compatible(model, path).loaded) == 364

    @pytest.mark.parametrize("content", ["truncated", "random", "list", "other network", "missing"])
    def test_broken_file_is_named_and_the_model_unchanged(self, model, theirs, tmp_path, content):
        path = tmp_path / "broken.pth"
        if content == "truncated":
            torch.save(theirs.state_dict(), path)
            path.write_bytes(path.read_bytes()[:-5000])
        elif content == "random":
            path.write_bytes(b"\x80\x02" + bytes(range(256)) * 9)
        elif content == "list":
            torch.save([1, 2, 3], path)
        elif content == "other network":
            torch.save({"layer1.weight": torch.zeros(3)}, path)
        before = copy.deepcopy(model.state_dict())
        error = FileNotFoundError if content == "missing" else RuntimeError
        with pytest.raises(error, match=r"broken\.pth"):
            load_compatible(model, path)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key])

    def test_nothing_fits(self, model):
        with pytest.raises(
            RuntimeError, match=r"the state_dict holds nothing that fits .*GoogLeNet"
        ):
            load_compatible(model, {"weight": torch.zeros(3)})

    @pytest.mark.parametrize("argument", [None, 3, [("fc.bias", 1)], nn.Linear(1, 1)], ids=type)
    def test_arguments_of_another_type(self, model, argument):
        with pytest.raises(TypeError, match="takes a state_dict or the path of a checkpoint"):
            load_compatible(model, argument)

    def test_report_is_readable(self):
        report = LoadReport(
            ["a", "b"], {"c": "not in the model"}, [f"layer{i}.weight" for i in range(12)]
        )
        lines = repr(report).splitlines()
        assert lines[0] == "LoadReport(2 loaded, 1 dropped, 12 newly initialised)"
        assert lines[1:4] == ["  dropped:", "    c: not in the model", "  newly initialised:"]
        assert lines[-1] == "    ... and 2 more" and len(lines) == 15
        assert repr(LoadReport(["a"], {}, [])) == (
            "LoadReport(1 loaded, 0 dropped, 0 newly initialised)"
        )
