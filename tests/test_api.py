"""Arguments, warnings and errors: whatever torchvision says to a call, we say too."""

import inspect
import os
import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import inception_ext
from inception_ext.weights import ImageClassification


def outcome(call):
    """What a call does, in comparable form: (warnings, error)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
            error = None
        except Exception as exception:
            error = (type(exception), str(exception))
    return [(w.category, str(w.message)) for w in caught], error


def assert_same_outcome(call, tv_googlenet):
    """Makes the call on both libraries and returns what both did."""
    ours, theirs = outcome(lambda: call(inception_ext)), outcome(lambda: call(tv_googlenet))
    assert ours == theirs
    return ours


@pytest.fixture
def published(tv_googlenet, hub_dir):
    """Stands in for the published checkpoint, in torch.hub's cache."""
    torch.manual_seed(3)
    state_dict = tv_googlenet.googlenet(init_weights=False).state_dict()
    torch.save(state_dict, os.path.join(hub_dir, "googlenet-1378be20.pth"))
    return state_dict


def test_signatures(tv_googlenet):
    ours = inspect.signature(inception_ext.GoogLeNet).parameters
    theirs = inspect.signature(tv_googlenet.GoogLeNet).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    assert list(inspect.signature(inception_ext.googlenet).parameters) == [
        *inspect.signature(tv_googlenet.googlenet).parameters
    ]
    assert inception_ext.GoogLeNetOutputs._fields == tv_googlenet.GoogLeNetOutputs._fields
    assert inception_ext._GoogLeNetOutputs is inception_ext.GoogLeNetOutputs


CALLS = {
    "init_weights left out": lambda lib: lib.GoogLeNet(),
    "init_weights=None": lambda lib: lib.googlenet(init_weights=None),
    "two blocks": lambda lib: lib.GoogLeNet(init_weights=False, blocks=[lib.BasicConv2d] * 2),
    "positional None": lambda lib: lib.googlenet(None, init_weights=False),
    "positional None, progress": lambda lib: lib.googlenet(None, False, init_weights=False),
    "positional False": lambda lib: lib.googlenet(False, init_weights=False),
    "pretrained=False": lambda lib: lib.googlenet(pretrained=False, init_weights=False),
    "weights=False": lambda lib: lib.googlenet(weights=False, init_weights=False),
    "unknown weights": lambda lib: lib.googlenet(weights="IMAGENET1K_V9"),
    "unknown argument": lambda lib: lib.googlenet(weights=None, init_weights=False, colour="red"),
    "no heads with weights": lambda lib: lib.googlenet(weights="DEFAULT", aux_logits=False),
    "other classes with weights": lambda lib: lib.googlenet(weights="DEFAULT", num_classes=10),
    "init with weights": lambda lib: lib.googlenet(weights="DEFAULT", init_weights=True),
    "init None with weights": lambda lib: lib.googlenet(weights="DEFAULT", init_weights=None),
}
EXPECTED = {  # the texts that users match on
    "two blocks": "blocks length should be 3 instead of 2",
    "no heads with weights": (
        "The parameter 'aux_logits' expected value True but got False instead."
    ),
    "other classes with weights": (
        "The parameter 'num_classes' expected value 1000 but got 10 instead."
    ),
    "init with weights": "The parameter 'init_weights' expected value False but got True instead.",
}


@pytest.mark.parametrize("name", CALLS)
def test_building_says_what_torchvision_says(tv_googlenet, name):
    _, error = assert_same_outcome(CALLS[name], tv_googlenet)
    if name in EXPECTED:
        assert error == (ValueError, EXPECTED[name])


def test_unknown_argument_names_it():
    with pytest.raises(TypeError, match="colour"):
        inception_ext.googlenet(colour="red")


WITH_WEIGHTS = {
    "enum": lambda lib: lib.googlenet(weights=lib.GoogLeNet_Weights.IMAGENET1K_V1),
    "name": lambda lib: lib.googlenet(weights="IMAGENET1K_V1"),
    "DEFAULT": lambda lib: lib.googlenet(weights="DEFAULT"),
    "full name": lambda lib: lib.googlenet(weights="GoogLeNet_Weights.IMAGENET1K_V1"),
    "kept heads": lambda lib: lib.googlenet(weights="DEFAULT", aux_logits=True),
    "transform_input=False": lambda lib: lib.googlenet(weights="DEFAULT", transform_input=False),
    "pretrained=True": lambda lib: lib.googlenet(pretrained=True),
    "positional True": lambda lib: lib.googlenet(True),
    "positional True, progress": lambda lib: lib.googlenet(True, False),
    "weights=True": lambda lib: lib.googlenet(weights=True),
    "weights='legacy'": lambda lib: lib.googlenet(weights="legacy"),
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_load_as_in_torchvision(tv_googlenet, published, name):
    models = []
    assert_same_outcome(lambda lib: models.append(WITH_WEIGHTS[name](lib)), tv_googlenet)
    ours, theirs = models
    assert ours.transform_input == theirs.transform_input == (name != "transform_input=False")
    assert ours.aux_logits == theirs.aux_logits == (name == "kept heads")
    assert (ours.aux1 is None) == (ours.aux2 is None) == (theirs.aux1 is None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, published[key]), key


def test_foreign_enum_is_a_type_error(torchvision, tv_googlenet):
    foreign = torchvision.models.ResNet18_Weights.DEFAULT
    _, error = assert_same_outcome(lambda lib: lib.googlenet(weights=foreign), tv_googlenet)
    assert error[0] is TypeError
    assert "expected GoogLeNet_Weights but received ResNet18_Weights" in error[1]


def test_torchvisions_own_weights_are_taken(tv_googlenet, published):
    model = inception_ext.googlenet(weights=tv_googlenet.GoogLeNet_Weights.DEFAULT)
    assert torch.equal(model.fc.weight, published["fc.weight"])
    assert model.transform_input


def test_too_many_positional_arguments():
    with pytest.raises(TypeError, match="at most 2 positional arguments"):
        inception_ext.googlenet(None, True, 10)


def run(images: torch.Tensor, training: bool = False, **kwargs):
    def call(lib):
        torch.manual_seed(0)
        return lib.GoogLeNet(5, init_weights=False, **kwargs).train(training)(images)

    return call


FORWARD_ERRORS = {
    "too small": (run(torch.zeros(2, 3, 14, 14)), RuntimeError, "Output size is too small"),
    "3-D": (run(torch.zeros(3, 64, 64)), ValueError, "expected 4D input (got 3D input)"),
    "3-D, transformed": (
        run(torch.zeros(3, 64, 64), transform_input=True),
        ValueError,
        "expected 4D input (got 3D input)",
    ),
    "one value a channel": (
        run(torch.zeros(1, 3, 32, 32), training=True),
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
    "four channels": (run(torch.zeros(2, 4, 64, 64)), RuntimeError, "to have 3 channels"),
    "other dtype": (run(torch.zeros(2, 3, 64, 64).double()), RuntimeError, "Double"),
    "uint8": (run(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)), RuntimeError, ""),
    "not a tensor": (run([1, 2]), TypeError, ""),
}


@pytest.mark.parametrize("name", FORWARD_ERRORS)
def test_forward_errors(tv_googlenet, name):
    call, error_type, text = FORWARD_ERRORS[name]
    _, error = assert_same_outcome(call, tv_googlenet)
    assert error is not None and error[0] is error_type and text in error[1]


def test_scripting_warns_as_torchvision_does(tv_googlenet):
    def call(lib):
        torch.jit.script(lib.GoogLeNet(5, init_weights=False).eval())(torch.zeros(1, 3, 32, 32))

    def messages(lib):  # TorchScript itself warns too, differently the second time
        return {text for _, text in outcome(lambda: call(lib))[0] if text.startswith("Scripted")}

    assert messages(inception_ext) == messages(tv_googlenet)
    assert messages(inception_ext) == {"Scripted GoogleNet always returns GoogleNetOutputs Tuple"}


def test_what_forward_returns(tv_googlenet):
    images = torch.randn(2, 3, 32, 32)
    for lib in (inception_ext, tv_googlenet):
        model = lib.GoogLeNet(5, init_weights=False)
        outputs = model(images)
        assert type(outputs) is lib.GoogLeNetOutputs
        assert [tuple(o.shape) for o in outputs] == [(2, 5)] * 3
        assert tuple(model.eval()(images).shape) == (2, 5)

        model.train().aux_logits = False  # the heads are there, their results are not asked for
        assert isinstance(model(images), torch.Tensor)

        model.aux_logits, model.aux1, model.aux2 = True, None, None
        outputs = model(images)
        assert type(outputs) is lib.GoogLeNetOutputs
        assert outputs.aux_logits1 is None and outputs.aux_logits2 is None

        model = lib.GoogLeNet(5, aux_logits=False, init_weights=False)
        assert isinstance(model(images), torch.Tensor)


def test_outputs_have_the_second_head_first():
    model = inception_ext.GoogLeNet(5, init_weights=False)
    model.aux1.register_forward_hook(lambda *_: torch.tensor(1.0))
    model.aux2.register_forward_hook(lambda *_: torch.tensor(2.0))
    outputs = model(torch.randn(2, 3, 32, 32))
    assert (outputs[1], outputs[2]) == (2.0, 1.0) == (outputs.aux_logits2, outputs.aux_logits1)


def test_positional_arguments_of_the_model():
    model = inception_ext.GoogLeNet(7, True, True, False, None, 0.1, 0.6)
    assert model.fc.out_features == 7
    assert model.transform_input
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (0.1, 0.6, 0.6)


def test_blocks_protocol(tv_googlenet):
    """Custom blocks are called as torchvision calls them."""

    def recorded(lib):
        calls = []

        def block(kind):
            def build(*args, **kwargs):
                calls.append((kind, args, sorted(kwargs.items())))
                return nn.Identity()

            return build

        lib.GoogLeNet(7, init_weights=False, blocks=[block("conv"), block("cat"), block("aux")])
        return calls

    assert recorded(inception_ext) == recorded(tv_googlenet)


def test_torchvisions_blocks_fit_in(tv_googlenet):
    blocks = [tv_googlenet.BasicConv2d, tv_googlenet.Inception, tv_googlenet.InceptionAux]
    model = inception_ext.GoogLeNet(5, init_weights=False, blocks=blocks)
    assert model(torch.randn(2, 3, 32, 32)).logits.shape == (2, 5)


class TestBranch3KernelSize:
    def test_five_is_the_5x5_of_the_paper(self):
        model = inception_ext.GoogLeNet(5, init_weights=False, branch3_kernel_size=5)
        for name, module in model.named_modules():
            if name.endswith("branch3.1.conv"):
                assert (module.kernel_size, module.padding) == ((5, 5), (2, 2))
            elif name.endswith("branch2.1.conv"):
                assert (module.kernel_size, module.padding) == ((3, 3), (1, 1))
        assert model(torch.randn(2, 3, 33, 47)).logits.shape == (2, 5)

    def test_goes_through_the_builder(self):
        model = inception_ext.googlenet(init_weights=False, branch3_kernel_size=5)
        assert model.inception5b.branch3[1].conv.kernel_size == (5, 5)

    @pytest.mark.parametrize("size", [1, 4, 7, "5"])
    def test_other_sizes_are_refused(self, size):
        with pytest.raises(ValueError, match="branch3_kernel_size should be 3 or 5 instead of"):
            inception_ext.Inception(16, 8, 8, 8, 8, 8, 8, branch3_kernel_size=size)


class TestClassifier:
    def test_features_and_head_make_up_the_forward_pass(self):
        model = inception_ext.GoogLeNet(5, init_weights=False, transform_input=True).eval()
        images = torch.randn(2, 3, 64, 64)
        features = model.forward_features(images)
        assert features.shape == (2, model.num_features, 2, 2)
        assert torch.equal(model.forward_head(features), model(images))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)

    def test_features_leave_the_heads_alone(self):
        model = inception_ext.GoogLeNet(5, init_weights=False)
        model.aux1.register_forward_hook(lambda *_: pytest.fail("aux1 ran"))
        model.forward_features(torch.randn(2, 3, 32, 32))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_reset(self, dtype):
        model = inception_ext.GoogLeNet(5, init_weights=False).to(dtype)
        assert model.get_classifier() is model.fc
        model.reset_classifier(7)
        outputs = model(torch.randn(2, 3, 32, 32, dtype=dtype))
        assert [tuple(o.shape) for o in outputs] == [(2, 7)] * 3
        assert {o.dtype for o in outputs} == {dtype}
        assert 0.005 < model.fc.weight.float().std() < 0.015

    def test_reset_without_heads(self):
        model = inception_ext.GoogLeNet(5, aux_logits=False, init_weights=False)
        model.reset_classifier(7)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)

    def test_reset_to_nothing_and_back(self):
        model = inception_ext.GoogLeNet(5, init_weights=False)
        model.reset_classifier(0)
        outputs = model(torch.randn(2, 3, 32, 32))
        assert [tuple(o.shape) for o in outputs] == [(2, 1024)] * 3
        model.reset_classifier(3)
        assert model(torch.randn(2, 3, 32, 32)).aux_logits1.shape == (2, 3)

    def test_negative_is_refused(self):
        with pytest.raises(ValueError, match="num_classes should not be negative but got -1"):
            inception_ext.GoogLeNet(5, init_weights=False).reset_classifier(-1)


class TestCheckpointPath:
    @pytest.fixture
    def saved(self, tmp_path):
        def save(file_name="mine.pth", wrap=None, **kwargs):
            model = inception_ext.GoogLeNet(init_weights=False, **{"num_classes": 5, **kwargs})
            state_dict = model.state_dict()
            path = tmp_path / file_name
            torch.save(state_dict if wrap is None else {wrap: state_dict, "epoch": 3}, path)
            return path, state_dict

        return save

    @pytest.mark.parametrize("as_type", [str, os.fspath, lambda path: path])
    def test_str_and_path(self, saved, as_type):
        path, state_dict = saved()
        model = inception_ext.googlenet(weights=as_type(path))
        assert model.aux_logits and not model.transform_input
        for key, value in model.state_dict().items():
            assert torch.equal(value, state_dict[key]), key

    def test_any_name_of_an_existing_file(self, saved):
        path, state_dict = saved("best.ckpt")
        model = inception_ext.googlenet(weights=str(path))
        assert torch.equal(model.fc.weight, state_dict["fc.weight"])

    @pytest.mark.parametrize("wrap", ["model", "state_dict"])
    def test_within_a_training_checkpoint(self, saved, wrap):
        path, state_dict = saved(wrap=wrap)
        model = inception_ext.googlenet(weights=path)
        assert torch.equal(model.fc.weight, state_dict["fc.weight"])

    def test_heads(self, saved):
        path, _ = saved()
        model = inception_ext.googlenet(weights=path, aux_logits=False)
        assert model.aux1 is None and not model.aux_logits
        path, _ = saved("no_heads.pth", aux_logits=False)
        model = inception_ext.googlenet(weights=path)
        assert model.aux1 is None and not model.aux_logits

    def test_the_published_file_is_taken_as_such(self, saved):
        path, _ = saved("googlenet-1378be20.pth", num_classes=1000)
        model = inception_ext.googlenet(weights=path)
        assert model.transform_input and model.aux1 is None
        assert not inception_ext.googlenet(weights=path, transform_input=False).transform_input

    def test_arguments_that_contradict_the_file(self, saved):
        path, _ = saved()
        with pytest.raises(RuntimeError, match=r"mine\.pth does not fit(?s:.*)fc\.weight"):
            inception_ext.googlenet(weights=path, num_classes=6)
        with pytest.raises(ValueError, match="'init_weights' expected value False"):
            inception_ext.googlenet(weights=path, init_weights=True)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
            inception_ext.googlenet(weights=str(tmp_path / "gone.pth"))

    def test_broken_files_are_named(self, saved, tmp_path):
        path, _ = saved()
        content = path.read_bytes()
        for size in (0, 10, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:size])
            with pytest.raises(RuntimeError, match=r"cannot read the checkpoint .*mine\.pth"):
                inception_ext.googlenet(weights=path)
        noise = random.Random(0)
        for first in range(256):  # each may be an instruction of a pickle
            path.write_bytes(bytes([first]) + noise.randbytes(255))
            with pytest.raises(RuntimeError, match=r"cannot read the checkpoint .*mine\.pth"):
                inception_ext.googlenet(weights=path)
        with pytest.raises(RuntimeError, match="cannot read the checkpoint"):
            inception_ext.googlenet(weights=__file__)

    def test_directory(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            inception_ext.googlenet(weights=tmp_path)

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ([1, 2], "should hold a state_dict but holds a list"),
            ({"epoch": 3}, "without tensors"),
            (torch.zeros(3), "holds a Tensor"),
            ({"fc.weight": torch.zeros(5, 7)}, "does not fit"),
        ],
        ids=["list", "no tensors", "tensor", "other network"],
    )
    def test_other_contents_are_named(self, tmp_path, content, text):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(RuntimeError, match=rf"other\.pth .*{text}"):
            inception_ext.googlenet(weights=tmp_path / "other.pth")

    def test_pickled_code_is_not_run(self, tmp_path):
        torch.save({"fc.weight": ImageClassification()}, tmp_path / "code.pth")
        with pytest.raises(RuntimeError, match=r"cannot read the checkpoint .*code\.pth"):
            inception_ext.googlenet(weights=tmp_path / "code.pth")


def test_repr_tells_the_settings():
    text = repr(inception_ext.GoogLeNet(5, init_weights=False, transform_input=True))
    assert "aux_logits=True, transform_input=True" in text


@pytest.mark.parametrize("slow", ["torchvision", "torch._dynamo", "sympy"])
def test_importing_the_package_does_not_import(slow):
    """What takes longer than all the rest, and most programs never need."""
    code = f"import sys, inception_ext; sys.exit({slow!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
