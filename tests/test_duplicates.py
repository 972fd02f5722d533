"""Copies of models are what `copy.deepcopy` gives."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import conjoin
from conjoin.duplicates import deepcopy


class Model(nn.Module):
    """Two layers, one of which stands at two names, and containers of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.again = self.first
        self.missing = None
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.kept = OrderedDict()
        self.kept.told = "of an empty dictionary"

    def forward(self, x):
        return self.second(self.first(x))


def held(model):
    """All that modules hold, tensors by what they are."""
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            inside = [*value] if isinstance(value, (dict, set)) else ()
            yield name, key, type(value), inside
            for each in value.values() if isinstance(value, dict) else ():
                if isinstance(each, torch.Tensor):
                    yield name, key, type(each), (each.tolist(), each.requires_grad)


def test_a_copy_is_what_python_makes():
    model = Model()
    model.first.register_forward_hook(print)
    assert [*held(deepcopy(model))] == [*held(copy.deepcopy(model))] == [*held(model)]


def test_nothing_is_in_common():
    model = Model()
    made = deepcopy(model)
    for (_, module), (_, other) in zip(model.named_modules(), made.named_modules(), strict=True):
        mutable = (dict, set, nn.Module, torch.Tensor)
        shared = [k for k, v in vars(module).items() if vars(other)[k] is v]
        assert not [key for key in shared if isinstance(vars(module)[key], mutable)]
    made.first.register_forward_hook(print)
    assert made.again is made.first
    assert not model.first._forward_hooks


def test_what_modules_share_is_shared_by_the_copies():
    model = Model()
    model.second._forward_hooks = model.first._forward_hooks
    made = deepcopy(model)
    assert made.second._forward_hooks is made.first._forward_hooks
    assert made.first._forward_hooks is not model.first._forward_hooks


def test_containers_of_the_models_own_are_taken_apart():
    assert deepcopy(Model()).kept.told == "of an empty dictionary"


@pytest.mark.parametrize("given", [True, False])
def test_the_memo(given):
    model = Model()
    weight = nn.Parameter(torch.ones(3, 3))
    made = deepcopy(model, {id(model.first.weight): weight} if given else None)
    assert (made.first.weight is weight) is given


class Materialized(nn.Module):
    """What puts a buffer in when it is copied."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def __getstate__(self):
        self._buffers["table"] = torch.ones(3)
        return self.__dict__

    def forward(self, x):
        return self.a(x) + self._buffers.get("table", torch.zeros(3)), self.b(x)


class MaterializedByHand(Materialized):
    """The same, where the class copies by itself."""

    def __deepcopy__(self, memo):
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made


@pytest.mark.parametrize("cls", [Materialized, MaterializedByHand])
def test_what_a_copy_puts_into_something_empty(cls):
    made = deepcopy(cls())
    assert made._buffers["table"].tolist() == [1.0] * 3
    model, x = nn.Sequential(cls()), torch.randn(5, 4)
    assert "table" in conjoin.optimize(model, (x,), policy="always")[0]._buffers
