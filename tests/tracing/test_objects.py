"""What code reads of objects that modules hold is noted, and each call looks whether it holds."""

import argparse
import copy
import dataclasses
import pickle
import types

import pytest
import torch
from equivalence import assert_close, assert_equivalent, tensors
from torch import nn

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class Feature:
    """What a layer is told of one of its inputs."""

    unit = 2.0

    def __init__(self, name, scale):
        self.name, self.scale, self.sizes, self.inner = name, scale, [1, 2], None

    @property
    def twice(self):
        return self.scale * 2

    def apply(self, x):
        return x * self.scale + len(self.sizes)

    @staticmethod
    def shifted(x):
        return x + 1


class Other(Feature):
    """One of another class"""


@dataclasses.dataclass
class Settings:
    width: int = 2
    names: tuple = ("p", "q")
    feature: Feature = dataclasses.field(default_factory=lambda: Feature("inner", 0.5))


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float = 2.0
    sizes: tuple = (1, 2)


class Checking(Feature):
    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)


class Computing(Feature):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return len(name)


class Watching(Feature):
    def __getattribute__(self, name):
        return object.__getattribute__(self, name)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.feature, self.settings = Feature("one", 2.0), Settings()
        self.features = [Feature("two", 3.0), Other("three", 4.0)]
        self.named = {"p": (Feature("four", 5.0), [Feature("five", 6.0)]), "q": 1}
        self.computing, self.watching = Computing("six", 1.0), Watching("seven", 1.0)
        self.frozen, self.checking = Frozen(), Checking("eight", 2.0)
        self.names, self.options = types.SimpleNamespace(scale=2.0), argparse.Namespace(bias=3.0)


def attribute(self, x):
    return self.a(x) * self.feature.scale, self.b(x)


def method(self, x):
    return self.feature.apply(self.a(x)), self.feature.shifted(self.b(x)) * self.feature.twice


def of_class(self, x):
    return self.a(x) * self.feature.unit, self.b(x)


def in_a_list(self, x):
    y = x
    for feature in self.features:
        if isinstance(feature, Other):
            y = y * feature.scale
    return self.a(y), self.b(y)


def nested(self, x):
    first, rest = self.named["p"]
    return self.a(x) * first.scale, self.b(x) * rest[0].scale * self.named["q"]


def object_in_an_object(self, x):
    y = self.settings.feature.apply(self.a(x))
    return y if "p" in self.settings.names else x, self.b(x) * self.settings.width


def of_namespaces(self, x):
    return self.a(x) * self.names.scale, self.b(x) + self.options.bias


def of_frozen(self, x):
    return self.a(x) * self.frozen.scale * len(self.frozen.sizes), self.b(x) * self.checking.twice


def is_none(self, x):
    return (self.a(x) if self.feature.inner is None else x), self.b(x)


def missing(self, x):
    return self.a(x) * getattr(self.feature, "gone", 3.0), self.b(x)


def asks(self, x):
    return self.a(x) * (3.0 if hasattr(self.feature, "gone") else 2.0), self.b(x)


def handed_on(self, x):
    return self.scaled(self.a(x), self.features), self.b(x)


def scaled(self, x, features):
    return x * features[-1].scale


Pair.scaled = scaled

REWRITTEN = [
    attribute,
    method,
    of_class,
    in_a_list,
    nested,
    object_in_an_object,
    of_namespaces,
    of_frozen,
    is_none,
    missing,
    asks,
    handed_on,
]


def assigns(self, x):
    self.feature.scale = self.feature.scale + 1
    return self.a(x) * self.feature.scale, self.b(x)


def appends(self, x):
    self.feature.sizes.append(1)
    return self.a(x) * len(self.feature.sizes), self.b(x)


def appends_an_object(self, x):
    self.features.append(self.feature)
    return self.a(x) * len(self.features), self.b(x)


def compares(self, x):
    return self.a(x) * (2 if self.feature == self.features[0] else 3), self.b(x)


def gives_back(self, x):
    return self.a(x), self.b(x), self.features


def is_true(self, x):
    return (self.a(x) if self.feature else x), self.b(x)


def computed(self, x):
    return self.a(x) * self.computing.anything, self.b(x)


def watched(self, x):
    return self.a(x) * self.watching.scale, self.b(x)


LEFT = [
    assigns,
    appends,
    appends_an_object,
    compares,
    gives_back,
    is_true,
    computed,
    watched,
]

X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (Pair,), {"forward": forward})().double()


def is_rewritten(model, x):
    return vars(model)[PLAN].find(model, (x,), {}) is not None


def each_of(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


@each_of(REWRITTEN)
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_rewritten(forward, inputs):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, inputs)
    assert isinstance(optimized, Region)
    for x in (X, X[:2]):
        assert is_rewritten(optimized, x)
        assert_equivalent(optimized, model, (x,))


@each_of(LEFT)
@pytest.mark.parametrize("inputs", [None, (X,)], ids=["traced", "observed"])
def test_left(forward, inputs):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, inputs)
    assert not isinstance(optimized, Region)
    if forward is not gives_back:
        assert_equivalent(optimized, model, (X,))


def of(name, attribute, value):
    """Sets an attribute of an object that an attribute of the model leads to."""
    return lambda model: setattr(getattr(model, name), attribute, value)


def of_cls(name, value):
    return lambda model: setattr(Feature, name, value)


class Doubled(float):
    """A number that multiplies as another."""

    def __rmul__(self, other):
        return other * 7


CHANGES = {
    "attribute": (attribute, of("feature", "scale", 9.0)),
    "attribute deleted": (attribute, lambda model: delattr(model.feature, "scale")),
    "equal number of another type": (attribute, of("feature", "scale", Doubled(2.0))),
    "object": (attribute, lambda model: setattr(model, "feature", Feature("new", 9.0))),
    "object deleted": (attribute, lambda model: delattr(model, "feature")),
    "class of an object": (method, of("feature", "__class__", Computing)),
    "class of an object in a list": (in_a_list, lambda model: setattr(
        model.features[0], "__class__", Other)),
    "method of the object": (method, of("feature", "apply", lambda x: x * 9)),
    "method of the class": (method, of_cls("apply", lambda self, x: x * 9)),
    "static method of the class": (method, of_cls("shifted", staticmethod(lambda x: x * 9))),
    "property": (method, of_cls("twice", property(lambda self: 9.0))),
    "read by a property": (method, of("feature", "scale", 9.0)),
    "read by a method": (method, lambda model: model.feature.sizes.append(9)),
    "list of an object": (method, of("feature", "sizes", [])),
    "of the class": (of_class, of_cls("unit", 9.0)),
    "hides that of the class": (of_class, of("feature", "unit", 9.0)),
    "in a list": (in_a_list, lambda model: setattr(model.features[1], "scale", 9.0)),
    "list": (in_a_list, lambda model: model.features.append(Other("new", 9.0))),
    "item of a list": (in_a_list, lambda model: model.features.__setitem__(
        0, Other("new", 9.0))),
    "nested": (nested, lambda model: setattr(model.named["p"][1][0], "scale", 9.0)),
    "nested list": (nested, lambda model: model.named["p"][1].insert(0, Feature("new", 9.0))),
    "object in an object": (object_in_an_object, lambda model: setattr(
        model.settings.feature, "scale", 9.0)),
    "another object in an object": (object_in_an_object, of(
        "settings", "feature", Feature("new", 9.0))),
    "names": (object_in_an_object, of("settings", "names", ())),
    "namespace": (of_namespaces, of("names", "scale", 9.0)),
    "options": (of_namespaces, of("options", "bias", 9.0)),
    "frozen": (of_frozen, lambda model: setattr(model, "frozen", Frozen(9.0))),
    "frozen, changed all the same": (of_frozen, lambda model: object.__setattr__(
        model.frozen, "scale", 9.0)),
    "checking": (of_frozen, of("checking", "scale", 9.0)),
    "no longer None": (is_none, of("feature", "inner", 1)),
    "no longer missing": (missing, of("feature", "gone", 9.0)),
    "no longer missing in the class": (asks, of_cls("gone", 9.0)),
    "handed on": (handed_on, lambda model: setattr(model.features[-1], "scale", 9.0)),
}  # fmt: skip


@pytest.fixture
def restored():
    """Puts the class back after it was changed."""
    before = dict(vars(Feature))
    yield
    for name in vars(Feature).keys() - before.keys():
        delattr(Feature, name)
    for name, value in before.items():
        if vars(Feature)[name] is not value:
            setattr(Feature, name, value)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("forward", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("how", ["itself", "copied", "compiled"])
def test_changed_afterwards(forward, change, how):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    if how == "copied":
        optimized = copy.deepcopy(optimized)
    assert is_rewritten(optimized, X)
    torch.compiler.reset()
    called = torch.compile(optimized, backend="eager") if how == "compiled" else optimized
    assert_close(dict(tensors(called(X))), dict(tensors(model(X))))
    for each in (optimized, model):
        change(each)
    outcomes = []
    for each in (called, model):
        try:
            outcomes.append(dict(tensors(each(X))))
        except AttributeError as error:
            outcomes.append({type(error).__name__: torch.tensor(0.0)})
    assert_close(*outcomes)


def test_a_copy_has_objects_of_its_own():
    model = with_forward(attribute)
    optimized = conjoin.optimize(model, (X,))
    copied = copy.deepcopy(optimized)
    optimized.feature.scale = 9.0
    assert is_rewritten(copied, X)
    assert not is_rewritten(optimized, X)
    assert_equivalent(copied, model, (X,))


def test_pickled(monkeypatch):
    monkeypatch.setitem(globals(), "Model", with_forward(in_a_list).__class__)
    globals()["Model"].__qualname__ = "Model"
    model = globals()["Model"]().double()
    loaded = pickle.loads(pickle.dumps(conjoin.optimize(model, (X,))))
    assert is_rewritten(loaded, X)
    assert_equivalent(loaded, model, (X,))
    loaded.features[1].scale = model.features[1].scale = 9.0
    assert not is_rewritten(loaded, X)
    assert_equivalent(loaded, model, (X,))


class Block(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.settings = settings

    def forward(self, x):
        return self.a(x) * self.settings.width + self.b(x)


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_that_are_alike_but_for_an_object(shared):
    settings = [Settings(width) for width in ((2, 2) if shared else (2, 3))]
    if shared:
        settings[1] = settings[0]
    model = nn.Sequential(*map(Block, settings)).double()
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized[0], Region)
    assert_equivalent(optimized, model, (X,))
    for each in (optimized, model):
        each[1].settings.width = 9
    assert_equivalent(optimized, model, (X,))


class Counting(nn.Module):
    """Not traced, and changes the object that it shares with the model"""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature

    def forward(self, x):
        self.feature.scale += 1
        return x


@pytest.mark.parametrize("shares", [True, False])
def test_a_module_that_is_not_traced_may_change_an_object(shares):
    def forward(self, x):
        y = self.counting(x)
        return self.a(y) * self.feature.scale, self.b(y)

    model = with_forward(forward)
    model.counting = Counting(model.feature if shares else Feature("other", 1.0))
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region) != shares
    for _ in range(3):
        torch.testing.assert_close(optimized(X)[0], model(X)[0], rtol=0, atol=1e-9)
