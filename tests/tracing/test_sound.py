"""Which forwards are traced soundly, and that all are right, whatever becomes of them."""

import math

import pytest
import torch
from equivalence import assert_equivalent
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.nn import Parallel
from conjoin.tracing.regions import Region

SCALE = 2.0
CACHE = {}


def doubled(x):
    return x * 2


def noticed(x):
    CACHE["last"] = x
    return x


def decorated(forward):
    def wrapped(self, x):
        return forward(self, x)

    return wrapped


class Pair(nn.Module):
    """Two siblings, and what a forward may need."""

    flag = True
    factor = 3.0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tail = nn.ModuleList([nn.Tanh(), nn.Linear(4, 4), nn.Dropout(0.5)])
        self.norm = nn.BatchNorm1d(4)
        self.post = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.named = nn.ModuleDict({"one": nn.Tanh(), "two": nn.Linear(4, 4)})
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("count", torch.zeros(()))
        self.scale, self.sizes, self.seen, self.options = 0.5, (2, 2), [], {"p": 1}
        self.nothing = None

    def heads(self, x):
        return self.a(x), self.b(x)

    @property
    def doubled_weight(self):
        return self.weight * 2

    @staticmethod
    def added(x, y):
        return x + y


def plain(self, x):
    return self.a(x), self.b(x)


def loop(self, x):
    y = self.a(x) + self.b(x)
    for layer in self.tail:
        y = layer(y)
    return y


def loop_over_pairs(self, x):
    return [layer(x) for _, layer in zip(range(2), [self.a, self.b], strict=True)]


def loop_over_names(self, x):
    y = self.a(x) * self.b(x)
    for name, layer in self.named.items():
        y = layer(y) + len(name)
    return y


def methods(self, x):
    a, b = self.heads(x)
    return self.added(a, b) * self.doubled_weight


def helpers(self, x):
    return doubled(self.a(x)), math.sqrt(4.0) * self.b(x)


def constants(self, x):
    return self.a(x) * self.scale, self.b(x) + self.scale


def tuples(self, x):
    return self.a(x).unflatten(-1, self.sizes), self.b(x)


def optional(self, x, scale=1.5, mask=None):
    return self.a(x) * scale, self.b(x)


def shapes(self, x):
    return self.a(x).reshape(x.shape[0], 2, -1), self.b(x) * x.size(-1)


def buffers(self, x):
    self.count.add_(1)
    return self.norm(self.a(x)) + self.count, self.b(x)


def dropped(self, x):
    return F.dropout(self.a(x), 0.5), torch.rand_like(x) + self.b(x)


def changed_in_place(self, x):
    a, b = self.a(x), self.b(x)
    return a.mul_(2), torch.tanh_(b)


def submodules(self, x):
    h = x * 2
    return self.a(h), self.b(h), self.post(h)


def dictionaries(self, x):
    return {"a": self.a(x), "rest": [self.b(x), {"sum": x.sum()}]}


REWRITTEN = [
    plain,
    loop,
    loop_over_pairs,
    loop_over_names,
    methods,
    helpers,
    constants,
    tuples,
    optional,
    shapes,
    buffers,
    dropped,
    changed_in_place,
    submodules,
    dictionaries,
]


def branch(self, x):
    return (self.a(x) if self.flag else x), self.b(x)


def branch_on_mode(self, x):
    return F.dropout(self.a(x), 0.5, self.training), self.b(x)


def is_none(self, x, mask=None):
    a = self.a(x)
    a = a if mask is None else a * mask
    return a, self.b(x)


def required_is_none(self, x):
    return self.a(x), self.b(x), x is None


def while_loop(self, x):
    n = 0
    while n < 2:
        x = self.a(x) + self.b(x)
        n = n + 1
    return x


def no_grad(self, x):
    with torch.no_grad():
        a = self.a(x)
    return a, self.b(x)


def set_grad_enabled(self, x):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    a = self.a(x)
    torch.set_grad_enabled(before)
    return a, self.b(x)


def autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.a(x), self.b(x)


def tries(self, x):
    try:
        return self.a(x), self.b(x)
    finally:
        self.seen.append(1)


def asserts(self, x):
    assert x.dim() == 2
    return self.a(x), self.b(x)


def raises(self, x):
    if x.dim() > 5:
        raise ValueError("too many")
    return self.a(x), self.b(x)


def by_type(self, x):
    return (self.a(x) if isinstance(x, torch.Tensor) else x), self.b(x)


def random_without_input(self, x):
    return self.a(x) + torch.randn(4).double(), self.b(x)


def stores(self, x):
    self.last = self.a(x)
    return self.last, self.b(x)


def counts(self, x):
    self.scale = self.scale + 1
    return self.a(x) * self.scale, self.b(x)


def appends(self, x):
    self.seen.append(1)
    return self.a(x) * len(self.seen), self.b(x)


def option(self, x):
    return self.a(x) * self.options["p"], self.b(x)


def global_number(self, x):
    return self.a(x) * SCALE, self.b(x)


def global_cache(self, x):
    return noticed(self.a(x)), self.b(x)


def deletes(self, x):
    parts = {"a": self.a(x), "b": self.b(x)}
    del parts["a"]
    return parts["b"]


def generator(self, x):
    yield self.a(x)
    yield self.b(x)


def imports(self, x):
    import os

    return self.a(x) * len(os.sep), self.b(x)


def writes_an_item(self, x):
    a = self.a(x)
    a[0] = 0
    return a, self.b(x)


def prints(self, x):
    print(end="")  # noqa: T201
    return self.a(x), self.b(x)


def comprehension_with_a_condition(self, x):
    return [layer(x) for layer in (self.a, self.b) if layer is not None]


def either_or(self, x):
    return self.a(x) * (self.nothing or 2), self.b(x)


def seeds(self, x):
    torch.manual_seed(3)
    return self.a(x) + torch.rand_like(x), self.b(x)


def asks_the_mode(self, x):
    return F.dropout(self.a(x), 0.5, torch.is_grad_enabled()), self.b(x)


def class_constant(self, x):
    """Nobody watches classes, whose attributes can change for all of their modules."""
    return self.a(x) * self.factor, self.b(x)


def mutable_default(self, x, seen=[]):  # noqa: B006 - As models have it.
    seen.append(1)
    return self.a(x) * len(seen), self.b(x)


def adds_to_the_input(self, x):
    x = x * 1
    kept = x
    x += 1
    return self.a(x), self.b(x), kept


def adds_to_a_view(self, x):
    h = x * 1
    rows = h.view(-1)
    rows *= 2
    return self.a(h), self.b(h)


def frozen_dtype(self, x):
    return self.a(x).to(torch.get_default_dtype()), self.b(x)


LEFT = [
    branch,
    branch_on_mode,
    is_none,
    required_is_none,
    while_loop,
    no_grad,
    set_grad_enabled,
    autocast,
    tries,
    asserts,
    raises,
    by_type,
    random_without_input,
    stores,
    counts,
    appends,
    option,
    global_number,
    global_cache,
    deletes,
    imports,
    writes_an_item,
    prints,
    comprehension_with_a_condition,
    either_or,
    seeds,
    asks_the_mode,
    class_constant,
    adds_to_the_input,
    adds_to_a_view,
    frozen_dtype,
    decorated(plain),
]
X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def named(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


@named(REWRITTEN)
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_rewritten(forward, inputs):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, inputs)
    assert isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))


@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_a_default_that_can_change_is_left(inputs):
    """Not compared with the original's output: the two share the default, and count in it."""
    model = with_forward(mutable_default)
    optimized = conjoin.optimize(model, inputs)
    assert not isinstance(optimized, Region)
    [seen] = mutable_default.__defaults__
    seen.clear()
    for count in (1, 2, 3):
        torch.testing.assert_close(optimized(X)[0], model.a(X) * count, rtol=0, atol=1e-9)
    assert len(seen) == 3


@named(LEFT)
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_left(forward, inputs):
    model = with_forward(forward)
    with torch.random.fork_rng():
        optimized = conjoin.optimize(model, inputs)
    assert not isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))


def test_a_generator_is_left():
    model = with_forward(generator)
    optimized = conjoin.optimize(model)
    assert not isinstance(optimized, Region)
    for ours, theirs in zip(optimized(X), model(X), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


class OfSuper(Pair):
    def forward(self, x):
        return super().heads(x)


class OfSuperForward(OfSuper):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("cls", [OfSuper, OfSuperForward])
def test_super(cls):
    model = cls().double()
    assert_equivalent(conjoin.optimize(model), model, (X,))


@pytest.mark.parametrize("container", [Parallel, nn.Sequential])
def test_containers_of_siblings(container):
    model = nn.Sequential(nn.Tanh(), Parallel(nn.Linear(4, 2), nn.Linear(4, 3))).double()
    assert_equivalent(conjoin.optimize(model), model, (X,))
    towers = (container(nn.Linear(4, 3), nn.Linear(4 if container is Parallel else 3, 2)),)
    model = Parallel(*towers, nn.Linear(4, 2)).double()
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))


def test_a_replaced_forward_is_left():
    model = with_forward(plain)
    model.forward = lambda x: (model.a(x) + 1, model.b(x))
    optimized = conjoin.optimize(model, (X,), inplace=True)
    assert not isinstance(optimized, Region)
    torch.testing.assert_close(optimized(X)[0], model.a(X) + 1)


@named([set_grad_enabled, no_grad, seeds])
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_modes_are_as_before(forward, inputs):
    model = with_forward(forward)
    state = torch.get_rng_state()
    conjoin.optimize(model, inputs)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


class Mean(Pair):
    """A class attribute that goes by the name of an operation."""

    mean = 2.0

    def forward(self, x):
        return self.a(x) * self.mean, self.b(x)


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        return x

    def drop(self, x):
        self.calls += 1
        return x * self.calls


class Ambiguous(Pair):
    """A method of a submodule that goes by the name of somebody's child."""

    def __init__(self):
        super().__init__()
        self.helper, self.drop = Helper(), nn.Identity()

    def forward(self, x):
        return self.helper.drop(self.a(x)), self.drop(self.b(x))


@pytest.mark.parametrize("model_class", [Mean, Ambiguous])
def test_names_that_stand_for_something_else_are_left(model_class):
    model = model_class().double()
    optimized = conjoin.optimize(model, (X,))
    assert not isinstance(optimized, Region)
    for _ in range(3):
        for ours, theirs in zip(optimized(X), model(X), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    type(model).mean = 3.0
    torch.testing.assert_close(optimized(X)[0], model(X)[0], rtol=0, atol=1e-9)
