"""Layers of the user's own: a `Kind` that is passed to `optimize` and `report`."""

import copy
import doctest
import io
import pickle
import sys

import pytest
import torch
from equivalence import assert_equivalent, assert_same_state, assert_same_structure
from families import wide_runs
from own_kinds import OWN_KINDS, Conv1D, Equalized, OfConv1D, OfEqualized, OwnHeads
from torch import nn

import conjoin
from conjoin.layers import KINDS, Kind, kind_of
from conjoin.layers.view import View, views
from conjoin.legality import Reason

PAIRS = {("a", "b"), ("c", "d"), ("e", "f")}


@pytest.fixture
def plain():
    return OwnHeads()


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64)


@pytest.fixture(params=["traced", "observed"])
def inputs(request, x):
    return (x,) if request.param == "observed" else None


@pytest.fixture
def optimized(plain, inputs):
    return conjoin.optimize(plain, inputs, kinds=OWN_KINDS)


def fused_in(report):
    return {group.layers for group in report.groups if group.fused}


def assert_as(model, plain, x):
    """Does what the plain model does, and runs each of three wide layers once."""
    assert_equivalent(model, plain, (x,))
    assert_same_state(model, plain)
    with wide_runs() as runs:
        model(x)
    assert len(runs) == len(set(runs)) == 3


def test_same_function(optimized, plain, x):
    assert_as(optimized, plain, x)
    assert isinstance(optimized.a, Equalized)
    assert conjoin.verify(plain, optimized, (x,))


def test_way_back(optimized, plain):
    restored = conjoin.unfuse(optimized)
    assert_same_state(restored, plain)
    assert_same_structure(restored, plain)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def optimized_again(model):
    return conjoin.optimize(model, (torch.randn(4, 6, dtype=torch.float64),), kinds=OWN_KINDS)


def optimized_without_the_kinds(model):
    return conjoin.optimize(model, (torch.randn(4, 6, dtype=torch.float64),))


def traced_without_the_kinds(model):
    return conjoin.optimize(model)


LIVES = (
    copy.deepcopy,
    through_pickle,
    through_file,
    optimized_again,
    optimized_without_the_kinds,
    traced_without_the_kinds,
)


@pytest.mark.parametrize("live", LIVES)
def test_life_goes_on(optimized, plain, x, live):
    lived = live(live(optimized))
    assert_as(lived, plain, x)
    assert_same_structure(conjoin.unfuse(lived), plain)


def test_report(plain, optimized, inputs, x):
    for model in (plain, optimized):
        assert fused_in(conjoin.report(model, inputs, kinds=OWN_KINDS)) == PAIRS
    assert fused_in(conjoin.report(optimized, inputs)) == PAIRS
    assert fused_in(conjoin.report(plain, (x,))) == {("e", "f")}
    groups = conjoin.report(plain, (x,), kinds=OWN_KINDS).groups
    assert [(group.kind, group.launches) for group in groups] == [
        ("Equalized", (4, 2)),
        ("Conv1D", (2, 2)),
        ("Linear", (2, 1)),
    ]


def test_a_sibling_that_was_taken_out_comes_back(optimized, plain, x):
    fused = optimized_again(optimized)
    with pytest.warns(UserWarning, match="taken out"):
        fused.b.scale = 2.0
    fused.b.scale = plain.b.scale
    assert not isinstance(fused.b, View)
    assert fused_in(conjoin.report(copy.deepcopy(fused), (x,), kinds=OWN_KINDS)) == PAIRS
    assert_as(optimized_again(copy.deepcopy(fused)), plain, x)


class Mixed(nn.Module):
    """The views of one kind beside layers of its base class"""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = Equalized(6, 3), Equalized(6, 2), *linears(2)
        self.double()

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.d(x)


def linears(number):
    return [nn.Linear(6, 3) for _ in range(number)]


def test_views_are_of_the_kind_that_they_were_fused_as(x):
    plain = Mixed()
    first = conjoin.optimize(plain, (x,), kinds=(OfEqualized(),))
    assert [name for name, _ in views(first)] == ["a", "b"]
    then = conjoin.optimize(first, (x,))
    assert fused_in(conjoin.report(then, (x,))) == {("a", "b"), ("c", "d")}
    assert_equivalent(then, plain, (x,))


@pytest.mark.parametrize("kinds", [OWN_KINDS, OWN_KINDS[::-1]], ids=["after", "before"])
def test_the_kind_of_the_most_specific_class(kinds):
    class Special(Equalized):
        pass

    for layer in (Equalized(6, 3), Special(6, 3)):
        assert type(kind_of(layer, kinds)) is OfEqualized
        assert kind_of(layer, kinds).check(layer) is None
    assert type(kind_of(nn.Linear(6, 3), kinds)) is type(KINDS[0])
    assert kind_of(nn.Tanh(), kinds) is None


def test_a_setting_that_differs(x):
    model = OwnHeads()
    model.b.scale = 1.0
    groups = conjoin.report(model, (x,), kinds=OWN_KINDS).groups
    assert groups[0].reason is Reason.DIFFERENT_SETTINGS
    assert "scale=1.0 where a has" in groups[0].detail


def test_a_setting_that_is_a_tensor(x):
    model = OwnHeads()
    model.b.scale = torch.tensor(2.0)
    refused = conjoin.report(model, (x,), kinds=OWN_KINDS).groups[0]
    assert refused.reason is Reason.UNSUPPORTED_OPTION
    assert "scale is a Tensor" in refused.detail


class Picky(OfEqualized):
    def check(self, layer):
        if layer.out_features > 4:
            return Reason.UNSUPPORTED_OPTION, f"out_features={layer.out_features}"
        return super().check(layer)


def test_a_check_of_its_own(x):
    group = conjoin.report(OwnHeads(), (x,), kinds=(Picky(),)).groups[0]
    assert (group.reason, group.detail) == (Reason.UNSUPPORTED_OPTION, "b: out_features=5")


def kind(**attributes):
    made = {"layer": Equalized, "settings": ("in_features",), "run": lambda self, wide, x: x}
    named = {name: value for name, value in {**made, **attributes}.items() if value is not None}
    return type("Mine", (Kind,), named)()


WRONG = {
    "one kind": (OfConv1D(), TypeError, r"a tuple of kinds, .*not OfConv1D.*\(\*conjoin.KINDS, "),
    "a class": ((*KINDS, OfConv1D), TypeError, r"OfConv1D is a class.*OfConv1D\(\)"),
    "no kind": ((nn.Linear,), TypeError, r"Linear.*subclass of conjoin.Kind"),
    "an object": ((3,), TypeError, "not int"),
    "none": ((), ValueError, "empty"),
    "no layer": ((kind(layer=None),), TypeError, "Mine.layer .* is missing"),
    "layer no class": ((kind(layer=Equalized(2, 2)),), TypeError, "Mine.layer .*it is Equalized"),
    "layer no module": ((kind(layer=int),), TypeError, "Mine.layer .*int"),
    "any module": (
        (kind(layer=nn.Module),),
        TypeError,
        "Mine.layer .*module.Module",
    ),
    "no settings": ((kind(settings=None),), TypeError, "Mine.settings .* is missing"),
    "settings a string": ((kind(settings=("nx")),), TypeError, r"Mine.settings .*'nx'"),
    "settings no names": ((kind(settings=(3,)),), TypeError, r"Mine.settings .*\(3,\)"),
    "weight_dim": ((kind(weight_dim="0"),), TypeError, "Mine.weight_dim .*'0'"),
    "weight_dim a flag": ((kind(weight_dim=True),), TypeError, "Mine.weight_dim .*True"),
    "weight_dim negative": ((kind(weight_dim=-1),), ValueError, "Mine.weight_dim .*0 to 1.*-1"),
    "weight_dim too large": ((kind(weight_dim=2),), ValueError, "Mine.weight_dim .*0 to 1.*2"),
    "output_dim a number": ((kind(output_dim=1.0),), TypeError, "Mine.output_dim .*1.0"),
    "output_dim counted up": ((kind(output_dim=1),), ValueError, "Mine.output_dim .*from the end"),
    "twice": (
        (*KINDS, OfConv1D(), kind(layer=Conv1D)),
        ValueError,
        "OfConv1D and Mine are both for Conv1D",
    ),
}


@pytest.mark.parametrize(("kinds", "error", "words"), WRONG.values(), ids=WRONG)
def test_what_is_no_kind(kinds, error, words, x):
    for call in (conjoin.optimize, conjoin.report):
        with pytest.raises(error, match=words):
            call(OwnHeads(), (x,), kinds=kinds)


def test_no_run():
    with pytest.raises(TypeError, match="abstract"):
        kind(run=None)


def test_a_list_of_kinds(plain, x):
    assert_as(conjoin.optimize(plain, (x,), kinds=[*OWN_KINDS]), plain, x)


def test_a_setting_that_the_layer_lacks(x):
    wrong = kind(settings=("in_channels",))
    groups = conjoin.report(OwnHeads(), (x,), kinds=(wrong,)).groups
    assert groups[0].reason is Reason.UNSUPPORTED_OPTION
    assert "it has no in_channels" in groups[0].detail


def test_kinds_are_values():
    assert OfConv1D() == OfConv1D() == copy.deepcopy(OfConv1D())
    assert len({OfConv1D(), OfConv1D(), OfEqualized()}) == 2
    one, other = OfConv1D(), OfConv1D()
    one.power = 2
    assert one != other


def test_the_example_in_the_docstring_runs():
    result = doctest.testmod(sys.modules[Kind.__module__])
    assert result.attempted > 0
    assert result.failed == 0


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OfDoubled(type(kind_of(nn.Linear(1, 1)))):
    """What is derived from a kind that conjoin knows."""

    layer = Doubled

    def run(self, wide, input):
        return super().run(wide, input) * 2


def test_a_kind_that_is_derived_from_one_of_conjoins(x):
    plain = conjoin.nn.Parallel(Doubled(6, 2), Doubled(6, 3)).double()
    fused = conjoin.optimize(plain, (x,), kinds=(OfDoubled(),))
    assert_equivalent(fused, plain, (x,))
    with wide_runs() as runs:
        fused(x)
    assert len(runs) == 1
