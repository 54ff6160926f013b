"""GoogLeNetLoss."""

import copy
import pickle
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inception_ext import GoogLeNetLoss, GoogLeNetOutputs

LABELS = torch.tensor([1, 0, 4])
MAIN, AUX2, AUX1 = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2))


def expected(weight=0.3, criterion=F.cross_entropy):
    return criterion(MAIN, LABELS) + weight * (criterion(AUX1, LABELS) + criterion(AUX2, LABELS))


def test_formula():
    loss = GoogLeNetLoss()(GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS)
    torch.testing.assert_close(loss, expected())


@pytest.mark.parametrize("weight", [0, 0.3, 1, 2.5])
def test_aux_weight(weight):
    loss = GoogLeNetLoss(weight)(GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS)
    torch.testing.assert_close(loss, expected(weight))


def test_a_tensor_is_the_main_head():
    torch.testing.assert_close(GoogLeNetLoss()(MAIN, LABELS), F.cross_entropy(MAIN, LABELS))


def test_torchvisions_outputs(tv_googlenet):
    loss = GoogLeNetLoss()(tv_googlenet.GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS)
    torch.testing.assert_close(loss, expected())


def test_other_tuples_go_by_name():
    Outputs = namedtuple("Outputs", ["aux_logits1", "aux_logits2", "logits"])
    torch.testing.assert_close(GoogLeNetLoss()(Outputs(AUX1, AUX2, MAIN), LABELS), expected())


@pytest.mark.parametrize("has_aux1", [True, False])
@pytest.mark.parametrize("has_aux2", [True, False])
def test_missing_heads_count_for_nothing(has_aux1, has_aux2):
    outputs = GoogLeNetOutputs(MAIN, AUX2 if has_aux2 else None, AUX1 if has_aux1 else None)
    total = F.cross_entropy(MAIN, LABELS)
    for head, has_it in ((AUX1, has_aux1), (AUX2, has_aux2)):
        if has_it:
            total = total + 0.3 * F.cross_entropy(head, LABELS)
    torch.testing.assert_close(GoogLeNetLoss()(outputs, LABELS), total)


@pytest.mark.parametrize(
    "criterion",
    [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1), nn.MultiMarginLoss()],
    ids=["function", "smoothed", "margin"],
)
def test_any_criterion(criterion):
    loss = GoogLeNetLoss(criterion=criterion)(GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS)
    torch.testing.assert_close(loss, expected(criterion=criterion))


def test_criterion_without_reduction():
    loss = GoogLeNetLoss(criterion=nn.CrossEntropyLoss(reduction="none"))
    assert loss(GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS).shape == (3,)


def test_soft_targets():
    target = torch.rand(3, 5).softmax(1)
    loss = GoogLeNetLoss()(GoogLeNetOutputs(MAIN, AUX2, AUX1), target)
    terms = [F.cross_entropy(x, target) for x in (MAIN, AUX1, AUX2)]
    torch.testing.assert_close(loss, terms[0] + 0.3 * (terms[1] + terms[2]))


def test_gradients_reach_all_heads():
    heads = [x.clone().requires_grad_() for x in (MAIN, AUX2, AUX1)]
    GoogLeNetLoss(0.5)(GoogLeNetOutputs(*heads), LABELS).backward()
    for head, weight in zip(heads, (1, 0.5, 0.5), strict=True):
        x = head.detach().requires_grad_()
        (weight * F.cross_entropy(x, LABELS)).backward()
        torch.testing.assert_close(head.grad, x.grad)


def test_a_criterion_with_buffers_moves_along():
    loss = GoogLeNetLoss(criterion=nn.CrossEntropyLoss(weight=torch.rand(5))).double()
    assert loss.criterion.weight.dtype == torch.float64
    assert "criterion.weight" in loss.state_dict()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("criterion", [None, F.cross_entropy])
def test_copies(clone, criterion):
    loss = clone(GoogLeNetLoss(0.4, criterion))
    assert loss.aux_weight == 0.4
    outputs = GoogLeNetOutputs(MAIN, AUX2, AUX1)
    torch.testing.assert_close(loss(outputs, LABELS), expected(0.4))


def test_compiles():
    loss = torch.compile(GoogLeNetLoss(), backend="eager", fullgraph=True)
    torch.testing.assert_close(loss(GoogLeNetOutputs(MAIN, AUX2, AUX1), LABELS), expected())


def test_repr_tells_the_weight():
    assert "aux_weight=0.3" in repr(GoogLeNetLoss())


@pytest.mark.parametrize("weight", ["0.3", None, True, torch.tensor(0.3), [0.3]], ids=repr)
def test_aux_weight_of_another_type(weight):
    with pytest.raises(TypeError, match="aux_weight should be a number instead of"):
        GoogLeNetLoss(weight)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_aux_weight_out_of_range(weight):
    with pytest.raises(ValueError, match="aux_weight should be finite and not negative instead of"):
        GoogLeNetLoss(weight)


@pytest.mark.parametrize("criterion", ["cross_entropy", 3, nn.CrossEntropyLoss], ids=str)
def test_criterion_that_is_none(criterion):
    with pytest.raises(TypeError, match="criterion should be a module or a function"):
        GoogLeNetLoss(criterion=criterion)


@pytest.mark.parametrize(
    "outputs", [None, (MAIN, AUX2, AUX1), SimpleNamespace(logits=MAIN), [MAIN]]
)
def test_outputs_of_another_type(outputs):
    with pytest.raises(TypeError, match="outputs should be a Tensor or have the fields"):
        GoogLeNetLoss()(outputs, LABELS)
