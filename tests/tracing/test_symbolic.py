"""Symbolic tracing from the root down finds siblings, and undoes what it did."""

import copy

import pytest
import torch
from equivalence import assert_equivalent, random_states
from torch import fx, nn

import conjoin
from conjoin.layers import KINDS
from conjoin.tracing.symbolic import trace

X = torch.randn(3, 4, dtype=torch.float64)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) + self.b(x)


class Branching(nn.Module):
    """Its children trace; it does not."""

    def __init__(self, *children):
        super().__init__()
        self.blocks = nn.ModuleList(children)
        self.named = nn.ModuleDict({"last": Heads()})

    def forward(self, x):
        for block in self.blocks:
            if x.sum() > -1e9:
                x = block(x)
        return self.named["last"](x)


class Sharing(nn.Module):
    """Does not trace; a layer of its own is also a layer of its block."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.block = Heads()
        self.block.a = self.shared

    def forward(self, x):
        if x.sum() > -1e9:
            x = self.shared(x)
        return self.block(x)


class Effects(Heads):
    """All that a forward may leave behind."""

    def __init__(self):
        super().__init__()
        self.seen, self.cache, self.names, self.calls, self.last = [], {}, set(), 0, None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.a(x)
        self.extra = x
        self.seen.append(x)
        self.cache["x"] = x
        self.names.add("x")
        self.count = self.count + 1
        return self.last + self.b(x) + torch.rand(4).double()


class Failing(Effects):
    def forward(self, x):
        super().forward(x)
        raise NotImplementedError


class OwnBuffer(Heads):
    """Changes a tensor that no argument goes into."""

    def __init__(self):
        super().__init__()
        self.plain = torch.zeros(2)

    def forward(self, x):
        self.plain.add_(1)
        return super().forward(x)


def calls(sightings):
    return [site.layer for site in sightings.sites]


def test_the_root_traces():
    sightings = trace(nn.Sequential(Heads(), nn.ReLU(), Heads()), KINDS)
    assert calls(sightings) == ["0.a", "0.b", "2.a", "2.b"]
    assert not sightings.untraced
    inputs = [site.input for site in sightings.sites]
    assert inputs[0] == inputs[1] != inputs[2] == inputs[3]


def test_descent():
    model = Branching(Heads(), Branching(Heads()), nn.Linear(4, 4))
    sightings = trace(model, KINDS)
    assert sorted(calls(sightings)) == sorted(
        f"{prefix}.{name}"
        for prefix in ("blocks.0", "blocks.1.blocks.0", "blocks.1.named.last", "named.last")
        for name in "ab"
    )
    assert [untraced.module for untraced in sightings.untraced] == ["", "blocks.1"]
    assert all(u.why.startswith("UnsoundError: Python looks") for u in sightings.untraced)


def test_what_was_found_in_parts_is_optimized():
    model = Branching(Heads(), Branching(Heads())).double()
    optimized = conjoin.optimize(model)
    assert len(list(optimized.parameters())) == len(list(model.parameters())) // 2
    assert_equivalent(optimized, model, (X,))


def test_a_module_at_two_names_is_looked_at_once():
    block = Heads()
    assert len(calls(trace(Branching(block, block), KINDS))) == 4


def test_a_layer_at_two_names_has_that_of_the_whole_model():
    model = Sharing().double()
    assert {site.layer for site in trace(model, KINDS).sites} == {"shared", "block.b"}
    assert_equivalent(conjoin.optimize(model), model, (X,))


@pytest.mark.parametrize("cls", [Effects, Failing, OwnBuffer])
def test_side_effects_are_undone(cls):
    model = cls()
    attributes = {name: str(value) for name, value in vars(model).items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = random_states()
    trace(model, KINDS)
    assert {name: str(value) for name, value in vars(model).items()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(random_states(), before, strict=True)
    )
    assert not proxies(model)


def proxies(model):
    values = [value for module in model.modules() for value in vars(module).values()]
    nested = [v for value in values for v in (value if isinstance(value, (list, set)) else [value])]
    nested += [v for value in values if isinstance(value, dict) for v in value.values()]
    return [value for value in nested if isinstance(value, (fx.Proxy, fx.Node))]


@pytest.mark.parametrize("cls", [Effects, OwnBuffer])
def test_optimizing_leaves_no_proxy(cls):
    model = cls()
    optimized = conjoin.optimize(model)
    assert not proxies(model)
    assert not proxies(optimized)
    assert_equivalent(optimized.double(), copy.deepcopy(model).double(), (X,))


def test_what_leaves_a_part_may_have_its_strides_read():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.a(x), self.b(x) * 2

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            if x.sum() > -1e9:
                a, b = self.inner(x)
            return a.view(-1), b.view(-1)

    model = Outer().double()
    assert set(trace(model, KINDS).strided) == {"inner.a"}
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert_equivalent(conjoin.optimize(model), model, (x,))


def test_no_layer_is_taken_for_a_module_to_look_into():
    assert not trace(nn.Linear(4, 4), KINDS).sites
    assert not conjoin.report(nn.Linear(4, 4)).groups
