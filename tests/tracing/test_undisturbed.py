"""A look at a model puts back what its code keeps, in whatever objects it keeps it."""

import argparse
import array
import collections
import contextlib
import dataclasses
import functools
import types

import numpy
import pytest
import torch
from equivalence import assert_equivalent
from torch import nn

import conjoin


class Slots:
    __slots__ = ("__hidden", "later", "n", "seen")

    def __init__(self):
        self.n, self.seen, self.__hidden = 0, [], 0

    def count(self):
        self.__hidden += 1
        self.later = self.n

    @property
    def hidden(self):
        return self.__hidden


class Both(Slots):
    """With attributes of its own beside the slots."""


@dataclasses.dataclass(slots=True)
class Record:
    n: int = 0
    seen: list = dataclasses.field(default_factory=list)


class Namespace(types.SimpleNamespace):
    """One of the user's own"""


def in_namespace(cls):
    return cls(n=0, seen=[])


KEPT = {
    "SimpleNamespace": lambda: in_namespace(types.SimpleNamespace),
    "argparse": lambda: in_namespace(argparse.Namespace),
    "own namespace": lambda: in_namespace(Namespace),
    "slots": Slots,
    "slots and attributes": Both,
    "dataclass with slots": Record,
}

ITEMS = {
    "UserDict": lambda: collections.UserDict(n=0),
    "ChainMap": lambda: collections.ChainMap({"n": 0}),
}


class Attributes(dict):
    """A dict whose items are attributes too, and that looks at what it is given."""

    def __init__(self, **items):
        super().__init__(items)
        vars(self).update(items)

    def __setitem__(self, name, value):
        assert not name.startswith("_")
        super().__setitem__(name, value)
        setattr(self, name, value)

    def copy(self):
        raise NotImplementedError


class Ordered(collections.OrderedDict):
    """Whose order changes without its keys"""


class Listed(list):
    """A list of the user's own"""


class Queued(collections.deque):
    """A deque of the user's own"""


class Chosen(set):
    """A set of the user's own"""


def moves(kept, x):
    kept.move_to_end("a")
    kept["c"] = [x]
    kept["b"].append(x)


def adds_one(kept, x):
    kept[0] += 1


VALUES = {
    "dict": (lambda: Attributes(n=0), lambda kept, x: kept.update(n=1) or keeps_items(kept, x)),
    "OrderedDict": (lambda: Ordered(a=1, b=[]), moves),
    "list": (lambda: Listed([1]), lambda kept, x: kept.append(x)),
    "deque": (lambda: Queued([1], 2), lambda kept, x: kept.extend([x, x])),
    "set": (lambda: Chosen({1}), lambda kept, x: kept.add(2)),
    "numpy": (lambda: numpy.zeros(2), adds_one),
    "numpy in a list": (lambda: [numpy.zeros(2)], lambda kept, x: adds_one(kept[0], x)),
    "array": (lambda: array.array("d", [0.0]), adds_one),
    "longer array": (lambda: array.array("d", [0.0]), lambda kept, x: kept.append(1.0)),
    "bytearray": (lambda: bytearray(2), adds_one),
    "RandomState": (lambda: numpy.random.RandomState(0), lambda kept, x: kept.rand()),
}


def value_of(kept):
    if isinstance(kept, numpy.random.RandomState):
        return [str(part) for part in kept.get_state()]
    return str(kept), str(getattr(kept, "__dict__", None))


def keeps(kept, x):
    kept.n += 1
    kept.seen.append(x)
    if isinstance(kept, Slots):
        kept.count()


def keeps_items(kept, x):
    kept["n"] += 1
    kept["new"] = x


def described(kept):
    names = ("n", "seen", "hidden", "later", "data", "maps")
    return {name: str(getattr(kept, name)) for name in names if hasattr(kept, name)}


HELD = types.SimpleNamespace()
"""What code finds as a global."""


class Heads(nn.Module):
    def __init__(self, kept, keep):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.kept, self.keep = kept, keep

    def forward(self, x):
        self.keep(self.kept, x)
        return self.a(x), self.b(x)


class OfGlobal(Heads):
    def forward(self, x):
        self.keep(HELD.kept, x)
        return self.a(x), self.b(x)


@pytest.mark.parametrize("cls", [Heads, OfGlobal])
@pytest.mark.parametrize("look", [conjoin.optimize, conjoin.report])
@pytest.mark.parametrize("inputs", [None, (torch.ones(2, 4),)], ids=["traced", "observed"])
@pytest.mark.parametrize(
    ("make", "keep"),
    [*((make, keeps) for make in KEPT.values()), *((make, keeps_items) for make in ITEMS.values())],
    ids=[*KEPT, *ITEMS],
)
def test_what_is_kept_is_put_back(cls, look, inputs, make, keep):
    kept = make()
    HELD.kept = kept
    model = cls(None if cls is OfGlobal else kept, keep)
    before = described(kept)
    look(model, inputs)
    assert described(kept) == before


@pytest.mark.parametrize("cls", [Heads, OfGlobal])
@pytest.mark.parametrize("look", [conjoin.optimize, conjoin.report])
@pytest.mark.parametrize("inputs", [None, (torch.ones(2, 4),)], ids=["traced", "observed"])
@pytest.mark.parametrize(("make", "keep"), VALUES.values(), ids=VALUES)
def test_values_are_put_back(cls, look, inputs, make, keep):
    kept = make()
    HELD.kept = kept
    model = cls(None if cls is OfGlobal else kept, keep)
    before = value_of(kept)
    look(model, inputs)
    assert value_of(kept) == before
    assert type(kept) is type(make())


RESIZED, ONES = torch.empty(0), torch.ones(5)
"""What code finds beside the model."""


@functools.lru_cache
def ones():
    """Made in place, and kept."""
    made = torch.zeros(3)
    made += 1
    return made


class Reading(nn.Module):
    """Does not run on fake tensors, and changes the sizes of others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        torch.add(ONES, 1, out=RESIZED)
        count = len(x.masked_select(x < 9))
        if ones().sum() != 3:
            raise ValueError
        return self.a(x) * count, self.b(x) * count


def test_sizes_are_put_back_and_what_is_made_meanwhile_stays():
    ones.cache_clear()
    model, x = Reading(), torch.randn(2, 4)
    assert [group.fused for group in conjoin.report(model, (x,)).groups] == [True]
    assert RESIZED.shape == (0,)
    assert torch.equal(ones(), torch.ones(3))
    assert_equivalent(conjoin.optimize(model, (x,)), model, (x,))


class Branching(nn.Module):
    """Calls a layer in a branch of `torch.cond`."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return torch.cond(y.sum() > 0, lambda t: self.c(t).relu(), lambda t: self.c(t).sin(), (y,))


def test_control_flow_runs_afterwards():
    """PyTorch 2.13 has branches with parameters that train fail in any mode, and from then on."""
    model, x = Branching().double(), torch.randn(3, 4).double()
    expected = model(x)
    with contextlib.suppress(ValueError):
        conjoin.report(model, (x,))
    assert torch.equal(model(x), expected)


def test_control_flow_that_does_not_train_is_merged():
    model, x = Branching().double().requires_grad_(False), torch.randn(3, 4).double()
    fused = conjoin.optimize(model, (x,), inplace=False)
    groups = conjoin.report(fused, (x,)).groups
    assert [group.layers for group in groups if group.fused] == [("a", "b")]
    for given in (x, -x):
        torch.testing.assert_close(fused(given), model(given))


class Compiled(nn.Module):
    """Calls a function and a module that are compiled each by itself."""

    def __init__(self, backend):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), Adding()
        self.inner.compile(backend=backend)
        self.function = torch.compile(lambda x: x.sin() + 1, backend=backend)

    def forward(self, x):
        y = self.function(self.inner(x))
        return self.a(y), self.b(y)


class Adding(nn.Module):
    def forward(self, x):
        return x.cos() + 1


@pytest.mark.parametrize("look", [conjoin.report, conjoin.optimize, conjoin.verify])
def test_what_the_model_compiles_is_compiled_afterwards(look):
    """PyTorch passes over a function for good once that was called within a dispatch mode."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    model, x = Compiled(backend), torch.randn(3, 4)
    look(model, *([model] if look is conjoin.verify else []), (x,))
    assert len(graphs) == 0
    model(x)
    assert len(graphs) == 2


class Counted(nn.Module):
    """A parametrization that changes a buffer at each use, as that of `spectral_norm` does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("uses", torch.zeros(()))

    def forward(self, weight):
        self.uses += 1
        return weight / self.uses


class Computed(nn.Module):
    """Branches whose later layers and norms compute their weights."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)
            )
            for _ in range(3)
        )
        for branch in self.branches[:2]:
            for layer in (branch[1], branch[3]):
                nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
        nn.utils.parametrizations.spectral_norm(self.branches[2][3])

    def forward(self, x):
        return [branch(x) for branch in self.branches]


@pytest.mark.parametrize("inputs", [(torch.randn(4, 6),), None], ids=["observed", "traced"])
def test_no_weight_is_computed(inputs):
    model = Computed()
    uses = {name: buffer.clone() for name, buffer in model.named_buffers()}
    optimized = conjoin.optimize(model, inputs, policy="always")
    for found in (model, optimized, conjoin.unfuse(optimized)):
        assert all(torch.equal(buffer, uses[name]) for name, buffer in found.named_buffers())


def refuse(*args, **kwargs):
    raise NotImplementedError


ASKED = "len bool iter contains getitem eq hash".split()


@pytest.mark.parametrize(
    "base", [object, tuple, list, dict, set, frozenset, collections.deque, collections.OrderedDict]
)
def test_methods_of_objects_that_the_model_holds_do_not_run(base):
    """Such as the length of what is a tuple for its items only, as e3nn's irreps are."""
    methods = {f"__{name}__": refuse for name in ASKED} | {"values": refuse, "items": refuse}
    methods["__deepcopy__"] = lambda self, memo: self
    model, x = conjoin.nn.Parallel(nn.Linear(4, 3), nn.Linear(4, 2)), torch.randn(3, 4)
    model.held = type("Held", (base,), methods)()
    for inputs in (None, (x,)):
        assert_equivalent(conjoin.optimize(model, inputs, policy="always"), model, (x,))
        assert [group.fused for group in conjoin.report(model, inputs).groups] == [True]
