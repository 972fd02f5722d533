"""Functions made by functions are traced, and the variables that they read are watched."""

import copy
import functools

import pytest
import torch
from equivalence import assert_close, assert_equivalent, tensors
from torch import nn

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


def plain(self, x):
    return self.a(x), self.b(x)


def with_factor(self, x, factor=1.0):
    return self.a(x) * factor, self.b(x)


def decorated(forward):
    def wrapped(self, x):
        a, b = forward(self, x)
        return a * 2, b

    return wrapped


def wrapping(forward):
    @functools.wraps(forward)
    def wrapped(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapped


def scaled(scale, names=("p",)):
    """Also gives what changes the variables"""
    options = {"p": [1.0, 2.0]}

    def forward(self, x):
        return self.a(x) * scale, self.b(x) * options[names[0]][1]

    def change(value):
        nonlocal scale
        scale = value

    return forward, change, options


def recursive():
    def repeat(x, count):
        return x if count == 0 else repeat(x * 2, count - 1)

    def forward(self, x):
        return repeat(self.a(x), 2), self.b(x)

    return forward


def counting(forward):
    calls = 0

    def wrapped(self, x):
        nonlocal calls
        calls += 1
        return forward(self, x)[0] * calls, self.b(x)

    return wrapped


def caching(forward):
    found = {}

    def wrapped(self, x):
        found["last"] = forward(self, x)
        return found["last"]

    return wrapped


def with_a_module(forward):
    layer = nn.Linear(4, 4).double()

    def wrapped(self, x):
        a, b = forward(self, x)
        return layer(a), b

    return wrapped


REWRITTEN = {
    "decorated": decorated(plain),
    "decorated twice": decorated(decorated(plain)),
    "wrapped": wrapping(plain),
    "with a default": wrapping(with_factor),
    "scaled": scaled(3.0)[0],
    "recursive": recursive(),
}
LEFT = {
    "counting": counting(plain),
    "caching": caching(plain),
    "with a module": with_a_module(plain),
    "without gradients": torch.no_grad()(plain),
}

X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def is_rewritten(model, x):
    return vars(model)[PLAN].find(model, (x,), {}) is not None


@pytest.mark.parametrize("forward", REWRITTEN.values(), ids=REWRITTEN)
def test_rewritten(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    for x in (X, X[:2]):
        assert is_rewritten(optimized, x)
        assert_equivalent(optimized, model, (x,))


@pytest.mark.parametrize("forward", LEFT.values(), ids=LEFT)
def test_left(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert not isinstance(optimized, Region)
    if "calls" not in forward.__code__.co_freevars:  # The two count together.
        assert_equivalent(optimized, model, (X,))


def test_super():
    class Inherited(Pair):
        forward = plain

    class Model(Inherited):
        def forward(self, x):
            a, b = super().forward(x)
            return a * 2, b

    model = Model().double()
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))


@pytest.mark.parametrize("how", ["itself", "copied", "compiled"])
@pytest.mark.parametrize("what", ["variable", "container", "cell"])
def test_changed_afterwards(what, how):
    forward, change, options = scaled(3.0)
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    if how == "copied":
        optimized = copy.deepcopy(optimized)
    assert is_rewritten(optimized, X)
    torch.compiler.reset()
    called = torch.compile(optimized, backend="eager") if how == "compiled" else optimized
    assert_close(dict(tensors(called(X))), dict(tensors(model(X))))
    if what == "variable":
        change(9.0)
    elif what == "container":
        options["p"][1] = 9.0
    else:
        names = forward.__code__.co_freevars
        forward.__closure__[names.index("options")].cell_contents = {"p": [9.0, 9.0]}
    assert_close(dict(tensors(called(X))), dict(tensors(model(X))))
