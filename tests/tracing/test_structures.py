"""Calls of every structure that was observed take a new forward; all others the original."""

import collections

import pytest
import torch
from equivalence import assert_close, tensors
from torch import nn

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region
from conjoin.tracing.structures import TENSOR, names_of, rebuilt, structure_of


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x, mask=None, *more, scale=1.0, flag=False, **others):
        a, b = self.a(x), self.b(x)
        if mask is not None:
            a = a * mask
        for other in more:
            b = b + other
        if flag:
            a = a + 1
        for name in others:
            b = b * others[name]
        return a * scale, b


class OfList(Heads):
    def forward(self, features):
        x = features[-1] + len(features)
        return [self.a(x), *features], {"b": self.b(x)}


class OfDict(Heads):
    def forward(self, batch):
        x = batch["x"]
        y = self.a(x) if batch.get("mask") is None else self.a(x) * batch["mask"]
        return y * (2 if batch["name"] == "two" else 3), self.b(x)


def x(*shape):
    return torch.randn(*shape or (5, 4))


def mask():
    return x(5, 3)


def calls_of_heads():
    return [
        ((x(),), {}),
        ((x(), mask()), {}),
        ((x(), mask(), x(5, 2), x(5, 2)), {}),
        ((x(),), {"mask": mask()}),
        ((x(), None), {}),
        ((), {"x": x()}),
        ((), {"mask": mask(), "x": x()}),
        ((x(),), {"scale": 2.0}),
        ((x(),), {"scale": x(1)}),
        ((x(),), {"flag": True}),
        ((x(),), {"flag": 1}),
        ((x(),), {"scale": -0.0}),
        ((x(),), {"scale": 0.0}),
        ((x(),), {"scale": float("nan"), "extra": x(1), "more_extra": 2}),
    ]


def same(optimized, model, args, kwargs):
    assert_close(*(dict(tensors(each(*args, **kwargs))) for each in (optimized, model)))


def rewritten(model, args, kwargs):
    return vars(model)[PLAN].find(model, args, kwargs) is not None


@pytest.mark.parametrize("number", range(len(calls_of_heads())))
def test_each_call_that_was_observed_is_rewritten_and_no_other(number):
    model = Heads()
    args, kwargs = calls_of_heads()[number]
    optimized = conjoin.optimize(model, args, example_kwargs=kwargs)
    assert isinstance(optimized, Region)
    assert rewritten(optimized, args, kwargs)
    for other, (more, named) in enumerate(calls_of_heads()):
        same(optimized, model, more, named)
        assert rewritten(optimized, more, named) == (other == number)


def test_several_structures():
    model, calls = Heads(), [args for args, kwargs in calls_of_heads() if not kwargs]
    optimized = conjoin.optimize(model, calls)
    for args in calls:
        same(optimized, model, args, {})
        assert rewritten(optimized, args, {})


LISTS = [[x()], [x(), x()], [x(), x(), x()]]
DICTS = [
    {"x": x(), "name": "two"},
    {"x": x(), "name": "three"},
    {"name": "two", "x": x(), "mask": mask()},
    {"x": x(), "name": "two", "mask": None},
]


@pytest.mark.parametrize(("cls", "calls"), [(OfList, LISTS), (OfDict, DICTS)])
def test_containers(cls, calls):
    model = cls()
    for example in calls:
        optimized = conjoin.optimize(model, (example,))
        assert isinstance(optimized, Region)
        for call in calls:
            same(optimized, model, (call,), {})
            assert rewritten(optimized, (call,), {}) == (call is example)


def appends(self, features):
    features.append(features[0])
    return self.a(features[0]), self.b(features[0])


def assigns(self, features):
    features[0] = features[0] * 2
    return self.a(features[0]), self.b(features[0])


def adds(self, features):
    features += [1]
    return self.a(features[0]), self.b(features[0])


def returns(self, features):
    return features, self.a(features[0]), self.b(features[0])


def returns_one_twice(self, features):
    both = [self.a(features[0]), self.b(features[0])]
    return both, both


def returns_its_own(self, features):
    return self.sizes, self.a(features[0]), self.b(features[0])


def hands_on(self, features):
    x = self.leaf(features)
    return self.a(x), self.b(x)


class Appends(nn.Module):
    def forward(self, features):
        self.last = features[0].detach()
        features.append(features[0])
        return features[0] * 2


@pytest.mark.parametrize(
    "forward",
    [appends, assigns, adds, returns, returns_one_twice, returns_its_own, hands_on],
    ids=lambda forward: forward.__name__,
)
def test_containers_that_are_changed_or_handed_out(forward):
    model = type("Model", (Heads,), {"forward": forward})()
    model.leaf, model.sizes = Appends(), [1, 2]
    optimized = conjoin.optimize(model, ([x()],))
    assert not isinstance(optimized, Region)
    first = [x()]
    given = [[*first], [*first]]
    outputs = [each(features) for each, features in zip((optimized, model), given, strict=True)]
    assert_close(*(dict(tensors(output)) for output in outputs))
    assert len(given[0]) == len(given[1])
    assert (outputs[0][0] is given[0]) == (outputs[1][0] is given[1])
    assert (outputs[0][0] is outputs[0][1]) == (outputs[1][0] is outputs[1][1])


class Special(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2).as_subclass(Special),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        collections.OrderedDict(x=torch.zeros(2)),
        object(),
        1j,
    ],
)
def test_no_structure(value):
    assert structure_of((value,), {}) is None
    assert structure_of((), {"x": [value]}) is None


def test_structures_are_told_apart_and_rebuilt():
    t = torch.zeros(2)
    calls = [((t,), {}), ((), {"x": t}), (([t],), {}), (((t,),), {}), ((1,), {}), ((True,), {})]
    calls += [((1.0,), {}), ((0.0,), {}), ((-0.0,), {}), (({"x": t, 1: None},), {}), ((), {})]
    found = [structure_of(*call) for call in calls]
    assert len({structure for structure, _ in found}) == len(calls)
    for (structure, leaves), call in zip(found, calls, strict=True):
        assert repr(rebuilt(structure, iter(leaves))) == repr(call)
    assert structure_of((t, t), {}) == (2, (t, t))


def test_names():
    def forward(self, x, lambda_, *more, **others):
        """A signature."""

    structure = (
        (tuple, TENSOR, (list, TENSOR, TENSOR), TENSOR),
        (dict, ((str, "if"), TENSOR), ((str, "y"), (dict, ((str, "a b"), TENSOR)))),
    )
    names = names_of(structure, forward)
    assert names[:4] == ["x", "lambda__0", "lambda__1", "more_2"]
    assert len(set(names)) == len(names) == 6
    assert all(name.isidentifier() for name in names)
