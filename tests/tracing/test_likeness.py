"""Like modules are traced once, and any difference that decides something is seen."""

import copy

import pytest
import torch
from equivalence import assert_equivalent
from torch import nn

import conjoin
from conjoin.tracing import sound
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class Scale:
    """An object of the user's, of which nothing is known."""

    def __init__(self, factor):
        self.factor = factor


class Block(nn.Module):
    """Siblings, and all kinds of values that decide what becomes of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.scale, self.offset, self.shifts = 6**-0.5, None, [1.0, 2.0]
        self.deep, self.twice = True, False

    def forward(self, x):
        parts = [self.norms[i](self.act(layer(x))) for i, layer in enumerate([self.a, self.b])]
        c = self.c(x) * self.scale + self.shifts[0]
        if self.offset is not None:
            c = c + self.offset
        if self.deep:
            c = c - self.shifts[1]
        if self.twice:
            c = c + self.a(c)
        return x + parts[0] * parts[1] + c


class Configured(nn.Module):
    """Siblings and an object that decides what the forward does."""

    def __init__(self, config):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.factor, self.config = config.factor, config

    def forward(self, x):
        return self.a(x) * self.factor + self.b(x)


def traces(monkeypatch):
    """Counts the modules' forwards that are traced."""
    traced = []
    trace = sound.trace

    def counted(region, *args, **kwargs):
        traced.append(region)
        return trace(region, *args, **kwargs)

    monkeypatch.setattr(sound, "trace", counted)
    return traced


def stacked(*changes):
    """Blocks in a row, each with a change, and an input."""
    torch.manual_seed(0)
    blocks = [Block() for _ in changes]
    for block, change in zip(blocks, changes, strict=True):
        change(block)
    return nn.Sequential(*blocks).double(), torch.randn(5, 6, dtype=torch.float64)


def unchanged(block):
    """A block as it is."""


def test_like_modules_are_traced_once(monkeypatch):
    config = Scale(2.0)
    model = nn.Sequential(*[Configured(config) for _ in range(4)]).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    traced = traces(monkeypatch)
    fused = conjoin.optimize(model, (x,))
    assert [block for block in traced if isinstance(block, Configured)] == [fused[0]]
    assert all(isinstance(block, Region) for block in fused)
    assert_equivalent(model, fused, (x,))


def test_so_are_those_of_a_copy_that_predicts_memory(monkeypatch):
    config = Scale(2.0)
    model = nn.Sequential(*[Configured(config) for _ in range(4)]).double()
    traced = traces(monkeypatch)
    conjoin.optimize(model, (torch.randn(5, 6, dtype=torch.float64),), memory_budget=2**40)
    blocks = [block for block in traced if isinstance(block, Configured)]
    assert len(blocks) == 2  # One of the copy, and one of the model.


CHANGES = {
    "a number": lambda block: setattr(block, "scale", 0.5),
    "the sign of zero": lambda block: setattr(block, "scale", -0.0),
    "an integer in the place of a flag": lambda block: setattr(block, "deep", 0),
    "a flag": lambda block: setattr(block, "deep", False),
    "a layer called twice": lambda block: setattr(block, "twice", True),
    "what is in a list": lambda block: block.shifts.__setitem__(0, 3.0),
    "a tensor in the place of None": lambda block: setattr(
        block, "offset", nn.Parameter(torch.ones(6))
    ),
    "a frozen layer": lambda block: block.a.requires_grad_(False),
    "a layer without bias": lambda block: setattr(block.b, "bias", None),
    "a setting of a norm": lambda block: setattr(block.norms[0], "eps", 0.1),
    "another activation": lambda block: setattr(block, "act", nn.Tanh()),
    "an activation that works in place": lambda block: setattr(block, "act", nn.ReLU(True)),
    "a layer at two places": lambda block: setattr(block, "c", block.a),
    "a shared weight": lambda block: setattr(block.c, "weight", block.a.weight),
    "a hook": lambda block: block.a.register_forward_hook(lambda m, args, out: out + 1) and None,
    "a forward of its own": lambda block: setattr(block.act, "forward", lambda x: x.sigmoid()),
    "another class": lambda block: setattr(
        block, "norms", nn.ModuleList(nn.Identity() for _ in range(3))
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("first", [False, True], ids=["behind", "ahead"])
def test_a_difference_is_seen(change, first):
    order = (change, unchanged) if first else (unchanged, change)
    model, x = stacked(unchanged, *order)
    fused = conjoin.optimize(model, (x,))
    assert_equivalent(model, fused, (x,))


def test_constants_that_are_equal_and_no_same_objects_keep_the_new_forward():
    model, x = stacked(unchanged, unchanged)
    for number, block in enumerate(model):
        block.scale = float(f"0.{25 + 0 * number}")
    assert model[0].scale is not model[1].scale
    fused = conjoin.optimize(model, (x,))
    for block in fused:
        variants = vars(block)[PLAN].variants
        assert all(any(each.function(block, (x,), {}) for each in of) for of in variants.values())


def test_a_change_of_one_of_two_like_modules_concerns_it_alone():
    model, x = stacked(unchanged, unchanged)
    fused = conjoin.optimize(model, (x,))
    other = copy.deepcopy(model)
    for changed in (fused, other):
        changed[1].scale = 3.0
        changed[0].shifts[1] = 5.0
    assert_equivalent(other, fused, (x,))


def test_objects_of_the_users_are_told_apart():
    model = nn.Sequential(*[Configured(Scale(factor)) for factor in (1.0, 2.0, 1.0)]).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert_equivalent(model, conjoin.optimize(model, (x,)), (x,))
