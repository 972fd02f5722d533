"""Cuts move above what acts on elements, where a product reads what is cut."""

import pytest
import torch
from scripted import Scripted, assert_same, both, branches, called, last, layers, randn, targets
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.graph import edit
from conjoin.graph.rising import rise


def relu(m, h, name):
    return F.relu(h)


def changed(m, h, name):
    return F.relu(h, inplace=True)


def scaled(m, h, name):
    return (h * 3).tanh()


def widths(m, h, name):
    return getattr(m, f"{name}_last")(h)


def linears(*suffixes):
    return layers(lambda: nn.Linear(4, 4), *suffixes)


def convs(*suffixes):
    return layers(lambda: nn.Conv2d(4, 4, 3, padding=1), *suffixes)


UNLIKE = {"a_last": nn.Linear(4, 2), "b_last": nn.Linear(4, 3), "c_last": nn.Linear(4, 5)}
UNLIKE_CONVS = {
    f"{name}_last": nn.Conv2d(4, 3, size) for name, size in zip("abc", (1, 3, 5), strict=True)
}
ROWS = randn(3, 4), randn(2, 3, 4), randn(4)
IMAGES = randn(2, 4, 8, 7), randn(4, 6, 6)

CUTTING = torch.unsafe_split_with_sizes
CUT = ["unsafe_split_with_sizes", "getitem", "getitem", "getitem"]

MOVED = {
    "cut": (branches(relu, widths), {**linears(""), **UNLIKE}, ROWS, [*CUT, *3 * ["relu"]]),
    "changed": (branches(changed, widths), {**linears(""), **UNLIKE}, ROWS, [*CUT, *3 * ["relu"]]),
    "several": (
        branches(scaled, widths),
        {**linears(""), **UNLIKE},
        ROWS,
        [*CUT, *3 * ["mul", "tanh"]],
    ),
    "convolutions": (
        branches(relu, widths),
        {**convs(""), **UNLIKE_CONVS},
        IMAGES,
        [*CUT, *3 * ["relu"]],
    ),
    "stack": (
        branches(relu, called("2"), last),
        linears("", "2"),
        ROWS,
        ["unflatten", "movedim", "relu"],
    ),
    "changed stack": (
        branches(changed, called("2"), last),
        linears("", "2"),
        ROWS,
        ["unflatten", "movedim", "relu"],
    ),
    "stack of products": (
        branches(relu, called("2"), relu, widths),
        {**linears("", "2"), **UNLIKE},
        ROWS,
        ["unflatten", "movedim", "relu", "a2.wide", "unstack", *3 * ["getitem"], *3 * ["relu"]],
    ),
}

LEFT = {
    "nothing is multiplied": (branches(relu, last), linears(""), ROWS),
    "the whole has another reader": (
        lambda m, x: [F.relu(h := m.a(x)).sin(), m.b(F.relu(h))],
        linears(""),
        ROWS,
    ),
    "in groups": (branches(relu, called("2"), last), convs("", "2"), IMAGES),
    "norms": (
        branches(called("n"), widths),
        {**convs(""), **layers(lambda: nn.BatchNorm2d(4), "n"), **UNLIKE_CONVS},
        IMAGES,
    ),
}


@pytest.mark.parametrize(("script", "modules", "inputs", "expected"), MOVED.values(), ids=MOVED)
def test_moved(script, modules, inputs, expected):
    traced, plain = both(Scripted(script, **modules))
    assert rise(traced.graph, edit.called_modules(traced))
    traced.graph.lint()
    traced.recompile()
    assert targets(traced)[1 : 1 + len(expected)] == expected
    assert_same(traced, plain, *inputs)
    assert not rise(traced.graph, edit.called_modules(traced))


@pytest.mark.parametrize(("script", "modules", "inputs"), LEFT.values(), ids=LEFT)
def test_left(script, modules, inputs):
    traced, plain = both(Scripted(script, **modules))
    before = targets(traced)
    assert not rise(traced.graph, edit.called_modules(traced))
    assert targets(traced) == before
    assert_same(traced, plain, *inputs)


def test_some_parts_are_cut_once_more_and_stacked():
    """One of four branches goes another way."""
    modules = {**linears("", "2"), "d": nn.Linear(4, 5)}

    def script(m, x):
        return [*branches(relu, called("2"), last)(m, x), F.relu(m.d(x)).sin()]

    traced, plain = both(Scripted(script, **modules))
    assert rise(traced.graph, edit.called_modules(traced))
    traced.graph.lint()
    traced.recompile()
    found = targets(traced)
    assert found[found.index("a2.wide") - 3 :][:2] == ["movedim", "relu"]
    assert_same(traced, plain, *ROWS)


def test_nothing_moves_into_another_mode():
    traced, _ = both(Scripted(branches(relu, widths), **linears(""), **UNLIKE))
    (split,) = (node for node in traced.graph.nodes if node.target is CUTTING)
    with traced.graph.inserting_before(split):
        traced.graph.call_function(torch._C._set_grad_enabled, (False,))
    assert not rise(traced.graph, edit.called_modules(traced))


class Optional(nn.Module):
    """Without its second input a layer reads nothing, which only a call would find out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.other = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, y=None):
        return F.relu(self.a(x)), F.relu(self.b(x)), self.other(y)


def test_a_product_that_reads_nothing():
    model = Optional().double()
    optimized, given = conjoin.optimize(model), (randn(2, 4), randn(2, 4))
    for ours, theirs in zip(optimized(*given), model(*given), strict=True):
        torch.testing.assert_close(ours, theirs)
