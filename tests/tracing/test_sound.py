"""Which forwards are traced soundly, and that all are right, whatever becomes of them."""

import copy
import enum
import math

import pytest
import torch
from equivalence import assert_close, assert_equivalent, tensors
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.nn import Parallel
from conjoin.tracing.plans import PLAN
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


FACTORS = {"b": 2.0}


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Pair(nn.Module):
    """Two siblings, and what a forward may need."""

    flag = True
    factor = 3.0
    factors = [2.0, 3.0]  # noqa: RUF012

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
        self.activation, self.kind = F.relu, Kind.ONE
        self.config = {"heads": [2, (3, {4})], "scale": 1.5}
        self.noise = Noise()

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
    assert x.shape[0] == 5
    return self.a(x), self.b(x)


def raises(self, x):
    if x.shape[0] > 5:
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


def unchanged_default(self, x, factors=[2.0], *, named={"p": [3.0]}):  # noqa: B006 - As above.
    return self.a(x) * factors[0] + len(factors), self.b(x) * named["p"][0]


def default_that_is_given_back(self, x, seen=[]):  # noqa: B006 - As above.
    return self.a(x), self.b(x), seen


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


def makes_activations(self, x):
    y = nn.ReLU(inplace=True)(self.a(x))
    return nn.Softmax(dim=-1)(y), nn.Flatten()(self.b(x))


def makes_a_dropout(self, x):
    return nn.Dropout(0.5)(self.a(x)), self.b(x)


def makes_a_setting_of_the_input(self, x):
    return nn.LeakyReLU(float(x.detach().sum() > 0))(self.a(x)), self.b(x)


LEFT = [
    makes_a_dropout,
    makes_a_setting_of_the_input,
    asserts,
    raises,
    no_grad,
    set_grad_enabled,
    autocast,
    tries,
    counts,
    appends,
    default_that_is_given_back,
    global_cache,
    imports,
    writes_an_item,
    prints,
    seeds,
    asks_the_mode,
    frozen_dtype,
]


def formats(self, x):
    name = f"{self.scale:.1f}-{'b'}"
    layers = {"0.5-b": self.b, "other": self.a}
    return self.a(x), layers[name](x)


def asserts_a_constant(self, x):
    assert self.scale < 1, "too large"
    if len(self.sizes) > 5:
        raise ValueError(self.sizes)
    return self.a(x), self.b(x)


def membership(self, x):
    y = self.a(x) if "p" in self.options and self.scale in {0.5, 1.5} else x
    return y, self.b(x)


def by_class(self, x):
    y = self.a(x) + self.b(x)
    for layer in self.tail:
        if isinstance(layer, (nn.Linear, nn.Tanh)):
            y = layer(y)
        if isinstance(layer, nn.Dropout) and layer.p > 0.9:
            y = y * 2
    return y


def by_name(self, x):
    y = getattr(self, "a")(x) + getattr(self, "b")(x)  # noqa: B009
    return y * 2 if hasattr(self, "missing") else y * getattr(self, "gone", 3)


def builtin_functions(self, x):
    biggest = max(self.sizes) + min(1, int(self.scale)) + round(abs(-1.2)) + len(self.tail)
    if any(size > 1 for size in self.sizes) and all(map(bool, sorted(self.sizes))):
        return self.a(x) * biggest, self.b(x) * float(sum(self.sizes))
    return x


def loops_by_index(self, x):
    y = self.a(x) + self.b(x)
    for i in range(len(self.tail)):
        y = self.tail[i](y)
    return self.tail[:2][0](y)


def chooses_an_activation(self, x):
    return self.activation(self.a(x)), torch.nn.functional.relu(self.b(x))


def nested_options(self, x):
    if self.config["heads"][0] == 2:
        return self.a(x) * self.config["scale"], self.b(x)
    return self.a(x), self.b(x) * 5


def class_list(self, x):
    return self.a(x) * self.factors[1], self.b(x) * FACTORS["b"]


def enums(self, x):
    return (self.a(x) if self.kind == Kind.ONE else x), self.b(x)


def dropout_by_mode(self, x):
    y = F.dropout(self.a(x), 0.5, training=self.training)
    return y if self.training else y * 3, self.b(x)


def of_class(self, x):
    return Pair.added(self.a(x), 1), self.b(x)


def augmented(self, x):
    y = self.a(x)
    y += self.b(x)
    y *= 2
    y -= 1
    y /= 3
    n = 1
    n += 1
    sizes = [1]
    sizes += [2]
    return y * n * sum(sizes)


def fills(self, x):
    y = x * torch.ones(4) + torch.arange(4)
    y[:, 0] = 1.5
    return y + self.a(x), self.b(x)


def made_of_shape(self, x):
    noise = torch.randn(x.shape[0], 4, dtype=x.dtype, device=x.device)
    return torch.zeros(len(self.sizes) + 2) + self.a(x) + noise, self.b(x)


def sorts_by_parameter(self, x):
    if self.weight is not None and self.nothing is None:
        return self.a(x) * self.weight, self.b(x)
    return x


def leaf_with_a_flag(self, x):
    return self.noise(self.a(x)), self.b(x)


def local_functions(self, x):
    twice = lambda y: y * 2  # noqa: E731
    y = self.b(x)
    return twice(self.a(x)), [f(y) * self.scale for f in (twice, torch.tanh)]


REWRITTEN = [
    makes_activations,
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
    branch,
    branch_on_mode,
    is_none,
    required_is_none,
    while_loop,
    random_without_input,
    option,
    global_number,
    deletes,
    comprehension_with_a_condition,
    either_or,
    class_constant,
    adds_to_the_input,
    adds_to_a_view,
    formats,
    asserts_a_constant,
    membership,
    by_class,
    by_name,
    builtin_functions,
    loops_by_index,
    chooses_an_activation,
    nested_options,
    class_list,
    enums,
    dropout_by_mode,
    of_class,
    augmented,
    fills,
    sorts_by_parameter,
    leaf_with_a_flag,
    local_functions,
    stores,
    unchanged_default,
    decorated(plain),
]
X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def each_of(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


@each_of(REWRITTEN)
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_rewritten(forward, inputs):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, inputs)
    assert isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))


def test_tensors_of_the_inputs_shape_are_made():
    """Observed only: a trace alone finds no siblings here."""
    model = with_forward(made_of_shape)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    assert_equivalent(optimized, model, (X,))
    assert_equivalent(optimized, model, (X[:2],))


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


@each_of(LEFT)
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


@each_of([set_grad_enabled, no_grad, seeds])
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
def test_names_that_stand_for_something_else(model_class):
    model = model_class().double()
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region) == (model_class is Mean)
    for _ in range(3):
        for ours, theirs in zip(optimized(X), model(X), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    type(model).mean = 3.0
    torch.testing.assert_close(optimized(X)[0], model(X)[0], rtol=0, atol=1e-9)


def reset(name, value):
    return lambda model: setattr(model, name, value)


def set_global(name, value):
    return lambda model: globals().__setitem__(name, value)


def set_class(name, value):
    return lambda model: setattr(Pair, name, value)


class Module(nn.Module):
    def forward(self, x):
        return x * 7


CHANGES = {
    "flag on the instance": (branch, reset("flag", False)),
    "flag on the class": (branch, set_class("flag", False)),
    "flag on the class of the optimized model": (
        branch,
        lambda model: setattr(type(model), "flag", False),
    ),
    "constant": (formats, reset("scale", 0.75)),
    "equal constant of another type": (constants, reset("scale", True)),
    "constant out of range": (asserts_a_constant, reset("scale", 2)),
    "item of a dict": (option, lambda model: model.options.update(p=4)),
    "dict": (membership, lambda model: model.options.clear()),
    "nested list": (nested_options, lambda model: model.config["heads"].insert(0, 1)),
    "nested dict": (nested_options, lambda model: model.config.update(scale=9.0)),
    "nested set": (nested_options, lambda model: model.config["heads"][1][1].add(9)),
    "list of a class": (class_list, lambda model: Pair.factors.append(1.0)),
    "item of a list of a class": (class_list, lambda model: Pair.factors.__setitem__(1, 8.0)),
    "list that hides that of the class": (class_list, reset("factors", [7.0, 7.0])),
    "global dict": (class_list, lambda model: FACTORS.update(b=8.0)),
    "default": (unchanged_default, lambda model: unchanged_default.__defaults__[0].append(1.0)),
    "item of a default": (unchanged_default, lambda model: unchanged_default.__defaults__[0].
        __setitem__(0, 9.0)),
    "list in a default by name": (unchanged_default, lambda model: unchanged_default.
        __kwdefaults__["named"]["p"].__setitem__(0, 9.0)),
    "global number": (global_number, set_global("SCALE", 8.0)),
    "global function": (helpers, set_global("doubled", lambda x: x * 9)),
    "global that hides a built-in function": (builtin_functions, set_global("len", lambda x: 9)),
    "method of the class": (methods, set_class("heads", lambda self, x: (x, x))),
    "method of the instance": (methods, reset("heads", lambda x: (x, x))),
    "property": (methods, set_class("doubled_weight", property(lambda self: 5))),
    "static method": (methods, set_class("added", staticmethod(lambda x, y: x - y))),
    "called on the class": (of_class, set_class("added", staticmethod(lambda x, y: x - y))),
    "activation": (chooses_an_activation, reset("activation", torch.tanh)),
    "enum": (enums, reset("kind", Kind.TWO)),
    "missing attribute": (by_name, reset("missing", None)),
    "missing attribute of the class": (by_name, set_class("missing", 1)),
    "missing child": (by_name, lambda model: model.add_module("gone", nn.Tanh())),
    "missing buffer": (by_name, lambda model: model.register_buffer("gone", X[0])),
    "class of a layer": (by_class, lambda model: model.tail.__setitem__(0, Module())),
    "layer that is only asked for": (by_class, lambda model: setattr(model.tail[2], "p", 0.95)),
    "more layers": (loops_by_index, lambda model: model.tail.append(nn.Sigmoid())),
    "None becomes a tensor": (sorts_by_parameter, reset("nothing", torch.ones(4))),
    "parameter becomes None": (sorts_by_parameter, reset("weight", None)),
    "training": (dropout_by_mode, lambda model: model.train()),
    "evaluation": (dropout_by_mode, lambda model: model.eval()),
    "mixed modes": (leaf_with_a_flag, lambda model: model.train().noise.eval()),
    "mixed modes of dropout": (loop, lambda model: model.eval().tail.train()),
    "forward of the class": (plain, lambda model: setattr(type(model), "forward", doubling)),
    "forward of an inlined class": (
        leaf_with_a_flag, lambda model: setattr(Noise, "forward", lambda self, x: x * 3)
    ),
    "forward of an inlined module": (leaf_with_a_flag, lambda model: setattr(
        model.noise, "forward", lambda x: x * 3)),
    "hook on an inlined module": (leaf_with_a_flag, lambda model: model.noise.
        register_forward_hook(lambda module, args, output: output * 2)),
    "inlined module replaced": (leaf_with_a_flag, reset("noise", Module())),
}  # fmt: skip


def doubling(self, x):
    return self.a(x) * 2, self.b(x)


@pytest.fixture
def restored():
    """Puts globals and classes back after they were changed."""
    held = copy.deepcopy((FACTORS, Pair.factors))
    defaults = copy.deepcopy((unchanged_default.__defaults__, unchanged_default.__kwdefaults__))
    mine, classes = dict(globals()), {cls: dict(vars(cls)) for cls in (Pair, Noise)}
    yield
    for name in globals().keys() - mine.keys():
        del globals()[name]
    globals().update(mine)
    for cls, before in classes.items():
        for name in vars(cls).keys() - before.keys():
            delattr(cls, name)
        for name, value in before.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)
    FACTORS.clear()
    FACTORS.update(held[0])
    Pair.factors[:] = held[1]
    unchanged_default.__defaults__, unchanged_default.__kwdefaults__ = defaults


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("forward", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_changed_afterwards(forward, change, copied):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region)
    if copied:
        optimized = copy.deepcopy(optimized)
        assert rewritten(optimized, X)
    for each in (optimized, model):
        change(each)
    outcomes = []
    for each in (optimized, model):
        torch.manual_seed(0)
        try:
            outcomes.append(dict(tensors(each(X))))
        except (AssertionError, TypeError, AttributeError, KeyError) as error:
            outcomes.append({"error": torch.tensor(0.0), type(error).__name__: torch.tensor(0.0)})
    assert_close(*outcomes)


def test_the_class_of_what_is_made_changes_afterwards(monkeypatch):
    model = with_forward(makes_activations)
    optimized = conjoin.optimize(model, (X,))
    assert rewritten(optimized, X)
    monkeypatch.setattr(nn.Softmax, "forward", lambda self, x: x * 3)
    assert not rewritten(optimized, X)
    assert_close(dict(tensors(optimized(X))), dict(tensors(model(X))))


def rewritten(model, *args, **kwargs):
    """Whether a call takes the new forward."""
    return vars(model)[PLAN].find(model, args, kwargs) is not None
