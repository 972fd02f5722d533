"""Layers behind the siblings are merged where an estimate is not against it."""

import dataclasses

import pytest
import torch
from equivalence import assert_equivalent
from machines import HIDDEN, STEADY
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.policy import machine
from conjoin.policy.cost import Setting, Work, level

FORWARD, TRAINING = (Setting(training, stacked=True) for training in (False, True))
NONE = ((0.0, 0.0), (1e9, 0.0))
FLAT = dataclasses.replace(
    STEADY,
    call=1.0,
    cut=0.5,
    step=0.0,
    rate=1.0,
    batched=1.0,
    bandwidth=1e9,
    written=NONE,
    joined=NONE,
    few_rows=HIDDEN,
)
COPIES = dataclasses.replace(STEADY, joined=((0.0, 0.0), (1e3, 0.0), (1e3 + 1, 1.0), (2e3, 2.0)))
"""A machine on which it takes a second to copy more than 1,000 bytes."""


class Towers(nn.Module):
    """n branches of two layers, or of one that reads a tensor of its own."""

    def __init__(self, count=3, width=8, *, siblings=True):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(6, width) for _ in range(count if siblings else 0))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, *inputs):
        read = [torch.relu(first(inputs[0])) for first in self.first] or inputs
        return [second(x) for second, x in zip(self.second, read, strict=True)]


def merged(model):
    return sorted(len(wide.widths) for wide in wides(model))


def work(**changes):
    return dataclasses.replace(Work(8, 8, 16, 16, 2), **changes)


def test_a_level_saves_launches():
    figures = level(FLAT, [work()] * 3, FORWARD, "stack")
    # Three products; a cut before and behind.
    assert (figures.apart, figures.whole) == (3 * 3 + 0.5, 1 + 3 * 2 + 0.5)
    assert figures.layers == 1


def test_tensors_of_their_own_are_joined_first():
    figures = level(FLAT, [work()] * 3, FORWARD, "apart")
    # One operation behind runs once for three.
    assert (figures.apart, figures.whole) == (3 * 3, 1 + 3 * 2 + 1 - 2)


@pytest.mark.parametrize(("operations", "layers"), [(10, 3), (2, 1)])
def test_tensors_of_their_own_are_joined_in_training_where_that_saves_much(operations, layers):
    group = [work(operations=operations)] * 3
    figures = level(FLAT, group, TRAINING, "apart")
    assert figures.whole < figures.apart
    assert figures.layers == layers
    from_memory = level(dataclasses.replace(FLAT, bandwidth=100.0), group, TRAINING, "apart")
    assert from_memory.whole - figures.whole == pytest.approx(2 * 3 * 8 / 100)


def test_what_a_convolution_reads_is_its_own_either_way():
    laid = ((0.0, 5.0), (1e3, 5.0))
    slow = dataclasses.replace(FLAT, convolved=laid, convolved_back=laid)
    setting, group = dataclasses.replace(TRAINING, stacked=False), [work(image=8)] * 3
    assert level(slow, group, setting, "beside") == level(FLAT, group, setting, "beside")


def test_gradients_are_copied_into_place():
    stack, beside = (level(FLAT, [work()] * 3, TRAINING, lie) for lie in ("stack", "beside"))
    # Three products for each layer; where it is cut, the parts' gradients are joined.
    assert stack.apart == beside.apart == 3 * (3 + 3 * 2) + 0.5 + 1
    assert stack.whole == 3 + 3 * 3 * 2 + 0.5 + 1
    assert beside.whole == stack.whole + 1


def test_convolutions_read_what_lies_side_by_side():
    figures = level(FLAT, [work()] * 3, dataclasses.replace(TRAINING, stacked=False), "beside")
    assert figures.whole == 3 + 3 * 3 * 2


def test_a_batched_product_has_to_be_quicker():
    large = [work(operations=10**6)] * 2
    costly = dataclasses.replace(FLAT, joined=((0.0, 0.0), (1.0, 100.0)))
    assert level(costly, large, TRAINING, "beside").layers == 2
    convolutions = dataclasses.replace(TRAINING, stacked=False)
    assert level(costly, large, convolutions, "beside").layers == 1


def test_a_batched_product_has_a_rate_of_its_own():
    slow = dataclasses.replace(FLAT, batched=0.5)
    figures = level(slow, [work()] * 3, FORWARD, "stack")
    assert (figures.apart, figures.whole) == (3 * 3 + 0.5, 1 + 3 * 2 * 2 + 0.5)
    assert figures.layers == 3
    assert (
        level(slow, [work()] * 3, dataclasses.replace(FORWARD, stacked=False), "stack").layers == 1
    )


def test_what_saves_nothing_by_itself_is_no_batched_product():
    large = dataclasses.replace(FLAT, call=0.0, cut=0.0, rate=1e-3, batched=1e-3)
    figures = level(large, [work()] * 3, FORWARD, "stack")
    assert figures.apart == figures.whole
    slower = dataclasses.replace(large, batched=0.999e-3)
    assert level(slower, [work()] * 3, FORWARD, "stack").layers == 3


@pytest.mark.parametrize("training", [True, False])
def test_what_does_not_pay_is_left_alone_and_said(monkeypatch, training):
    # Only gradients are copied, where they are joined.
    known = COPIES if training else STEADY
    monkeypatch.setattr(machine, "constants", lambda device, dtype: known)
    model = Towers().double().train(training)
    x = (torch.randn(64, 6, dtype=torch.float64),)
    fused = conjoin.optimize(model, x)
    assert merged(fused) == ([] if training else [3, 3])
    assert_equivalent(fused, model, x)
    for told in (conjoin.report(model, x), conjoin.report(fused, x)):
        rows = {group.layers: group for group in told.groups}
        second = rows.get(tuple(f"second.{i}" for i in range(3)))
        assert (second is not None) is training
        if training:
            assert second.reason is conjoin.Reason.DOES_NOT_PAY
            assert second.detail == str(second.figures)
            assert second.figures.apart < second.figures.whole
    assert merged(conjoin.optimize(model, x, policy="always")) == [3, 3]


def test_tensors_of_their_own(monkeypatch):
    model = Towers(siblings=False).double().eval()
    inputs = tuple(torch.randn(64, 8, dtype=torch.float64) for _ in range(3))
    before = merged(conjoin.optimize(model, inputs))
    monkeypatch.setattr(machine, "constants", lambda device, dtype: COPIES)
    assert merged(conjoin.optimize(model, inputs)) == []
    assert merged(conjoin.optimize(model, inputs, policy="always")) == before


def test_small_towers_are_merged():
    x = (torch.randn(4, 6),)
    for model in (Towers(), Towers().eval()):
        assert merged(conjoin.optimize(model, x)) == [3, 3]
