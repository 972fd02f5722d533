"""A race times what it says, and leaves the layers as they are."""

import copy

import pytest
import torch
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.policy import race


def heads():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(32, 16) for _ in range(4))).double()


@pytest.mark.parametrize("training", [True, False])
def test_a_race(training):
    model, x = heads(), torch.randn(4, 32, dtype=torch.float64)
    among = (((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)))
    kind = next(kind for kind in conjoin.KINDS if kind.layer is nn.Linear)
    layers = list(model.children())
    before = copy.deepcopy(model.state_dict())
    taken = race.run(
        kind, layers, frozenset({1}), x.requires_grad_(training), among, training=training
    )
    assert list(taken) == list(among)
    assert all(seconds > 0 for seconds in taken.values())
    assert all(type(layer) is nn.Linear and layer.weight.grad is None for layer in layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_race_of_forms_that_are_what_they_say():
    kind = next(kind for kind in conjoin.KINDS if kind.layer is nn.Linear)
    plain = race.Siblings(list(heads().children()))
    made = race._as(plain, kind, frozenset({3}), ((0, 3), (1, 2)))
    (first, second) = wides(made)
    assert {len(first.widths), len(second.widths)} == {2}
    assert first.contiguous | second.contiguous == {1}
    assert not wides(race._as(plain, kind, frozenset(), ((0,), (1,), (2,), (3,))))
