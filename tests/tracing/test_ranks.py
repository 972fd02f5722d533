"""What code asks of numbers of dimensions is answered, and holds for calls with the same."""

import copy
import pickle

import pytest
import torch
from equivalence import assert_equivalent
from torch import nn

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)
        self.table = nn.Embedding(9, 4)
        self.gain = nn.Parameter(torch.randn(5, 1, 1, 6))


def asserts(self, x):
    assert x.dim() == 3
    return self.a(x), self.b(x)


def raises(self, x):
    if x.ndim > 5:
        raise ValueError(f"too many: {x.ndim}")
    return self.a(x), self.b(x)


def heads(self, x):
    shape = (*x.shape[:-1], -1, 3)
    return self.a(x).view(shape).transpose(1, 2), self.b(x).view(*x.size()[:-1], 2, 3)


def of_inner_values(self, x):
    y = (self.a(x) + 1).unsqueeze(1)
    return y if y.dim() == 4 else y * 2, self.b(x) * len(y.shape)


def loop_over_sizes(self, x):
    y = self.a(x)
    for size in x.shape:
        y = y / size
    return y, self.b(x)


def of_a_view(self, x):
    batch, length, _ = x.shape
    y = self.a(x).view(batch, length, 2, 3)
    return y * y.dim(), self.b(x)


def of_a_table(self, x):
    y = self.table(x.argmax(-1).view(x.shape[:-1]))
    return self.a(y) * y.ndim, self.b(y)


def of_a_sum_of_shapes(self, x):
    shape = x.shape[:-1] + (2, 3)  # noqa: RUF005 - As models have it.
    return self.a(x).view(shape) * len(shape), self.b(x)


def last_or_first(self, x):
    return self.a(x) * len(x.shape[-2:]), self.b(x)


def by_default(self, x):
    """A number that is computed on each call where it is not known"""
    return self.a(x) * (x + self.gain[..., :4]).dim(), self.b(x)


KNOWN = [
    asserts,
    raises,
    heads,
    of_inner_values,
    loop_over_sizes,
    of_a_view,
    of_a_table,
    of_a_sum_of_shapes,
    last_or_first,
    by_default,
]


def broadcast(self, x):
    y = self.a(x) * self.gain
    return y * 2 if y.dim() == 4 else y, self.b(x)


def by_name(self, x):
    y = torch.add(self.a(x), other=self.b(x).unsqueeze(0))
    return y * 2 if y.dim() == 3 else y * 3, self.b(x)


def squeezed(self, x):
    y = self.a(x[:1]).squeeze()
    return y * 2 if y.dim() == 2 else y, self.b(x)


def in_place(self, x):
    y = x * 1
    y.unsqueeze_(0)
    return self.a(y) * (2 if y.dim() == 3 else 3), self.b(y)


def in_place_before(self, x):
    y = x * 1
    known = y.dim()
    y.unsqueeze_(0)
    return self.a(y) * known, self.b(y) * (2 if y.dim() == 4 else 3)


def sizes(self, x):
    return self.a(x) * (2 if x.shape[0] == 5 else 3), self.b(x)


def length_of_a_tensor(self, x):
    return self.a(x) * len(x), self.b(x)


UNKNOWN = [broadcast, by_name, squeezed, in_place, in_place_before, sizes, length_of_a_tensor]

X = torch.randn(5, 3, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def is_rewritten(model, x):
    return vars(model)[PLAN].find(model, (x,), {}) is not None


def each_of(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


@each_of(KNOWN)
def test_known(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    for x in (X, X[:2], X[:1, :1], X.transpose(0, 1)):
        assert is_rewritten(optimized, x)
        assert_equivalent(optimized, model, (x,))


@each_of(UNKNOWN)
def test_unknown(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert not isinstance(optimized, Region)
    for x in (X, X[:2], X[:1, :1]):
        assert_equivalent(optimized, model, (x,))


@each_of([raises, of_inner_values, loop_over_sizes, last_or_first])
@pytest.mark.parametrize(
    "copies", [copy.copy, copy.deepcopy, pickle.loads], ids=["copy", "deepcopy", "pickle"]
)
def test_another_number_of_dimensions(forward, copies, monkeypatch):
    """Such a call takes the original forward, and the next goes on as before; so in copies."""
    monkeypatch.setitem(globals(), "Model", with_forward(forward).__class__)
    globals()["Model"].__qualname__ = "Model"
    model = globals()["Model"]().double()
    optimized = conjoin.optimize(model, (X,))
    if copies is pickle.loads:
        optimized = pickle.loads(pickle.dumps(optimized))
    elif copies is copy.deepcopy:
        optimized = copy.deepcopy(optimized)
    for x in (X[0], X[None], X):
        assert is_rewritten(optimized, x) == (x is X)
        assert_equivalent(optimized, model, (x,))


@each_of([raises, loop_over_sizes])
def test_several_numbers_of_dimensions(forward):
    """Where the example calls differ, nothing is taken for granted."""
    model = with_forward(forward)
    optimized = conjoin.optimize(model, [(X,), (X[0],)])
    assert not isinstance(optimized, Region)
    for x in (X, X[0]):
        assert_equivalent(optimized, model, (x,))


class Gate(nn.Module):
    """Not traced, and may do to its input what it likes."""

    def forward(self, x):
        if x.shape[-1] == 4 and x.dim() == 3:
            x.unsqueeze_(0)
        return x


def after_a_module(self, x):
    y = self.gate(x * 1)
    z = y * 1
    return self.a(y), self.b(y) * z.dim()


def of_what_a_module_got(self, x):
    y = x * 1
    self.gate(y)
    return self.a(y) * (2 if y.dim() == 3 else 5), self.b(y)


@each_of([after_a_module, of_what_a_module_got])
def test_modules_that_are_not_traced(forward):
    model = with_forward(forward)
    model.gate = Gate()
    optimized = conjoin.optimize(model, (X,))
    for x in (X, X[0]):
        assert_equivalent(optimized, model, (x,))


@each_of([heads, of_inner_values, of_a_view])
def test_compiled(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    compiled = torch.compile(optimized, backend="aot_eager", fullgraph=True)
    for x in (X, X[:2]):
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-9)
