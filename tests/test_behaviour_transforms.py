"""inception_ext.GoogLeNet within what traces, compiles, exports and transforms it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from behaviour_cases import IMAGES, LABELS, assert_same_inference, assert_same_training, in_dtype_of
from closeness import NETWORK_TOLERANCE, assert_network_as_good_as_eager
from torch.func import functional_call, grad, jvp, vmap

# Tracing and compiling


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("transform_input", [True, False], ids=["transform", "plain"])
def test_fx_node_names(make_pair, training, transform_input):
    ours, theirs = make_pair(transform_input=transform_input)
    graphs = [torch.fx.symbolic_trace(m.train(training)).graph for m in (ours, theirs)]
    names = [[(node.op, node.name) for node in graph.nodes] for graph in graphs]
    assert names[0] == names[1]


def test_fx_graph_computes_the_same(make_pair):
    model = make_pair()[0].eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(IMAGES), model(IMAGES), **NETWORK_TOLERANCE)


def test_feature_extraction(torchvision, trio):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert get_graph_node_names(trio[0]) == get_graph_node_names(trio[1])
    nodes = ["conv1.conv", "maxpool1", "inception3b.cat", "inception4c.branch2.1.relu", "flatten"]
    results = []
    for model in trio:
        extractor = create_feature_extractor(model.eval(), nodes)
        results.append(extractor(in_dtype_of(model, IMAGES)))
    assert_network_as_good_as_eager(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchscript(make_pair, training):
    model = make_pair(transform_input=True)[0].train(training)
    scripted = torch.jit.script(copy.deepcopy(model))
    expected = model(IMAGES)
    outputs = scripted(IMAGES)
    expected = expected.logits if training else expected
    torch.testing.assert_close(outputs.logits, expected, **NETWORK_TOLERANCE)
    assert (outputs.aux_logits1 is not None) == training

    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file).eval()
    torch.testing.assert_close(loaded(IMAGES).logits, scripted.eval()(IMAGES).logits)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compile_fullgraph(trio, training):
    trio[0].compile(backend="aot_eager", fullgraph=True)
    (assert_same_training if training else assert_same_inference)(trio)


def test_export_with_dynamic_shapes(trio):
    auto = torch.export.Dim.AUTO  # the pools' rounding ties H and W in ways no Dim can say
    program = torch.export.export(
        trio[0].eval(), (torch.randn(2, 3, 65, 70),), dynamic_shapes=({0: auto, 2: auto, 3: auto},)
    )
    exported = program.module()
    for shape in ((3, 3, 65, 70), (2, 3, 96, 67), (5, 3, 80, 127)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = trio[1].eval()(images)
            torch.testing.assert_close(exported(images), expected, **NETWORK_TOLERANCE)


# Derivatives of other kinds

SMALL = IMAGES[:, :, :32, :32].contiguous()


def test_per_sample_gradients(trio):
    """vmap(grad(functional_call)), the per-sample gradients of torch.func."""
    results = []
    for model in trio:
        model.eval()
        names = ("conv1.conv.weight", "inception4a.branch3.1.bn.weight", "fc.weight")
        parameters = {k: p.detach() for k, p in model.named_parameters() if k in names}

        def loss(parameters, image, label, model=model):
            logits = functional_call(model, parameters, (image[None],))
            return F.cross_entropy(logits, label[None])

        images = in_dtype_of(model, SMALL)
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, LABELS)
        results.append({f"{name}.grad": value for name, value in grads.items()})
    assert_network_as_good_as_eager(*results)


def test_vmap_with_transform_input(make_pair):
    ours, theirs = (model.eval() for model in make_pair(transform_input=True))
    expected = theirs(SMALL)
    for images in (SMALL, SMALL.to(memory_format=torch.channels_last)):
        outputs = vmap(ours)(images[:, None])[:, 0]
        torch.testing.assert_close(outputs, expected, **NETWORK_TOLERANCE)


def test_forward_mode(trio):
    results = []
    for model in trio:
        x = in_dtype_of(model, SMALL)
        value, tangent = jvp(model.eval(), (x,), (torch.ones_like(x),))
        results.append({"value": value.detach(), "tangent.grad": tangent.detach()})
    assert_network_as_good_as_eager(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward(trio, training):
    """A gradient penalty: the loss holds the gradient of the input."""
    results = []
    for model in trio:
        x = in_dtype_of(model, SMALL).requires_grad_()
        logits = model.train(training)(x)
        logits = logits.logits if training else logits
        (first,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        results.append(
            {
                "first.grad": first.detach(),
                "x.grad": x.grad,
                "weight.grad": model.inception4a.branch2[1].conv.weight.grad,
                "gamma.grad": model.inception4a.branch2[1].bn.weight.grad,
            }
        )
    assert_network_as_good_as_eager(*results)
