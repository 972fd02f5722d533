"""Forwards that keep values as attributes of modules are rewritten, and keep them as before."""

import copy

import pytest
import torch
from equivalence import assert_close, assert_equivalent, tensors
from torch import nn

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class Inner(nn.Module):
    def forward(self, x):
        self.seen = x.sum()
        return x * 2


class Pair(nn.Module):
    unit = 2.0

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.b = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.inner, self.scale, self.kept = Inner(), 0.5, None
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("total", torch.zeros(4))


def keeps(self, x):
    self.last = self.a(x)
    return self.last, self.b(x)


def keeps_several(self, x):
    a, b = self.a(x), self.b(x)
    self.parts = {"a": a, "rest": [b, (1, "two", None)]}
    self.sizes = [y.shape[-1:] for y in (a, b)]
    return a + b


def keeps_inside(self, x):
    return self.inner(self.a(x)), self.b(x)


def reads_it_back(self, x):
    self.last = self.a(x)
    self.last = self.last * 2 if self.last is not None else x
    return self.last + getattr(self, "last"), self.b(x), hasattr(self, "last")  # noqa: B009


def appends_afterwards(self, x):
    self.parts = []
    for layer in (self.a, self.b):
        self.parts.append(layer(x))
    return self.parts[0] * 2, self.parts[1]


def in_a_comprehension(self, x):
    self.parts = [y * self.scale for y in (self.a(x), self.b(x))]
    return self.parts[0]


def hides_that_of_the_class(self, x):
    self.unit = self.a(x)
    return self.unit, self.b(x)


def never(self, x):
    if self.scale > 1:
        self.scale = 1
    return self.a(x) * self.scale, self.b(x)


REWRITTEN = [
    keeps,
    keeps_several,
    keeps_inside,
    reads_it_back,
    appends_afterwards,
    in_a_comprehension,
    hides_that_of_the_class,
    never,
]


def counts(self, x):
    self.scale = self.scale + 1
    return self.a(x) * self.scale, self.b(x)


def fills_a_cache(self, x):
    if self.kept is None:
        self.kept = self.a(x)
    return self.kept, self.b(x)


def of_a_buffer(self, x):
    self.total = self.a(x).detach().sum(0)
    return self.total, self.b(x)


def of_a_child(self, x):
    self.inner = self.b
    return self.a(x), self.inner(x)


def of_a_parameter(self, x):
    self.alias = self.weight
    return self.a(x) * self.alias, self.b(x)


def of_another_module(self, x):
    self.inner.last = self.a(x)
    return self.a(x), self.b(x)


def one_list_twice(self, x):
    self.parts = [self.a(x), self.b(x)]
    return self.parts


def of_a_tensor(self, x):
    y = self.a(x)
    marked(y)
    return y, self.b(x)


def marked(y):
    y.mark = 1


def deletes(self, x):
    self.last = self.a(x)
    del self.last
    return self.a(x), self.b(x)


LEFT = [
    counts,
    fills_a_cache,
    of_a_buffer,
    of_a_child,
    of_a_parameter,
    of_another_module,
    one_list_twice,
    of_a_tensor,
    deletes,
]

X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def each_of(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


def kept(model):
    """What modules have kept, with the gradients of what has one."""
    found = {}
    for path, module in model.named_modules():
        for name in ("last", "parts", "sizes", "seen", "unit", "scale", "kept", "total"):
            if name in vars(module):
                found |= dict(tensors(vars(module)[name], f"{path}.{name}"))
                found[f"{path}.{name}.repr"] = torch.tensor(len(str(type(vars(module)[name]))))
    return found


@each_of(REWRITTEN + LEFT)
@pytest.mark.parametrize("training", [True, False])
def test_kept(forward, training):
    model = with_forward(forward).train(training)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region) == (forward in REWRITTEN)
    assert kept(optimized).keys() == kept(model).keys()
    for x in (X, X[:2], X):
        if forward in REWRITTEN:
            assert vars(optimized)[PLAN].find(optimized, (x,), {}) is not None
        assert_close(dict(tensors(optimized(x))), dict(tensors(model(x))))
        assert_close(kept(optimized), kept(model))


@each_of([forward for forward in REWRITTEN if forward is not reads_it_back])
def test_equivalent(forward):
    model = with_forward(forward)
    assert_equivalent(conjoin.optimize(model, (X,)), model, (X,))


def test_a_copy_keeps_its_own():
    optimized = conjoin.optimize(with_forward(keeps).requires_grad_(False), (X,))
    copied = copy.deepcopy(optimized)
    optimized(X)
    assert not hasattr(copied, "last")
    copied(X)
    assert copied.last is not optimized.last


def of_a_view(self, x):
    marks(self.a[0], 1)
    return self.a(x), self.b(x)


def marks(layer, value):
    layer.scale = value


def of_an_owner(self, x):
    """Of a module whose own Parameters were merged"""
    self.last = x @ self.first
    return self.last, x @ self.second


def test_modules_with_methods_of_their_own_to_set_attributes():
    model = with_forward(of_a_view)
    optimized = conjoin.optimize(model, (X,))
    assert not isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))
    model = with_forward(of_an_owner)
    model.first, model.second = (nn.Parameter(torch.randn(4, 3).double()) for _ in range(2))
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    assert not hasattr(optimized, "last")
    for x in (X, X[:2]):
        assert_close(dict(tensors(optimized(x))), dict(tensors(model(x))))
        assert_close(kept(optimized), kept(model))


class Looking(nn.Module):
    """Not traced, and sees what the model keeps"""

    def __init__(self, holder):
        super().__init__()
        self.holders = [holder]

    def forward(self, x):
        return x * 2 if getattr(self.holders[0], "mark", 0) == 1 and x.sum() != 7 else x


def test_modules_that_may_look():
    def forward(self, x):
        self.mark = 1
        y = self.looking(x)
        self.mark = 2
        return self.a(y), self.b(y)

    model, optimized = (with_forward(forward) for _ in range(2))
    optimized.load_state_dict(model.state_dict())
    for each in (model, optimized):
        each.looking = Looking(each)
    optimized = conjoin.optimize(optimized, (X,), inplace=True)
    assert not isinstance(optimized, Region)
    for _ in range(2):
        torch.testing.assert_close(optimized(X), model(X), rtol=0, atol=1e-9)


@each_of([keeps, keeps_several])
def test_compiled(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    torch.compiler.reset()
    compiled = torch.compile(optimized, backend="aot_eager")
    for x in (X, X[:2], X):
        assert_close(dict(tensors(compiled(x))), dict(tensors(model(x))))
        assert_close(kept(optimized), kept(model))
