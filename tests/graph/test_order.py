"""What must stay in order stays, and all else is changed as little as may be."""

import pytest
import torch
from scripted import Scripted
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import edit, order


def traced(script):
    model = Scripted(script, d=nn.Dropout(), e=nn.Dropout(), n=nn.BatchNorm1d(4), u=nn.ReLU())
    return fx.symbolic_trace(model)


def edges_of(graph_module):
    return order.constraints(graph_module.graph, edit.called_modules(graph_module))


def kept(script):
    """The pairs of names of which the second must come after the first."""
    graph_module = traced(script)
    return {(a.name, b.name) for b, before in edges_of(graph_module).items() for a in before}


KEPT = {
    "dropouts": (lambda m, x: (m.d(x), m.e(x)), ("d", "e")),
    "random functions": (lambda m, x: (F.dropout(x), torch.rand_like(x)), ("dropout", "rand_like")),
    "random fills": (lambda m, x: ((x * 1).uniform_(), m.d(x)), ("uniform_", "d")),
    "exponential": (lambda m, x: ((x * 1).exponential_(), m.d(x)), ("exponential_", "d")),
    "statistics": (lambda m, x: (m.n(x), m.n(x)), ("n", "n_1")),
    "a change": (lambda m, x: (x.add_(1), x.sin()), ("add_", "sin")),
    "before a change": (lambda m, x: (x.sin(), x.add_(1)), ("sin", "add_")),
}


@pytest.mark.parametrize(("script", "pair"), KEPT.values(), ids=KEPT)
def test_kept_in_order(script, pair):
    assert pair in kept(script)


FREE = {
    "activations": lambda m, x: (m.u(x), x.sin()),
    "one of two kinds": lambda m, x: (m.n(x), m.d(x)),
}


@pytest.mark.parametrize("script", FREE.values(), ids=FREE)
def test_free(script):
    assert kept(script) == set()


def test_dropout_counts_also_while_it_is_idle():
    model = traced(lambda m, x: (m.d(x), m.e(x))).eval()
    assert any(edges_of(model).values())
    assert not order.is_random_module(nn.Dropout(0.0))


def test_sorting_changes_nothing_that_is_in_order():
    model = traced(lambda m, x: m.d(x.sin()) + m.e(x.cos()))
    before = [node.name for node in model.graph.nodes]
    order.sort(model.graph, edges_of(model))
    assert [node.name for node in model.graph.nodes] == before


def test_sorting_mends_the_order():
    model = traced(lambda m, x: m.d(x.sin()) + m.e(x.cos()))
    expected = [node.name for node in model.graph.nodes]
    edges = edges_of(model)
    nodes = {node.name: node for node in model.graph.nodes}
    nodes["output"].append(nodes["sin"])
    nodes["x"].append(nodes["e"])
    order.sort(model.graph, edges)
    model.graph.lint()
    names = [node.name for node in model.graph.nodes]
    assert {*names} == {*expected}
    assert names.index("d") < names.index("e")


def test_what_stands_in_for_others_keeps_their_place():
    model = traced(lambda m, x: (x.sin(), x.add_(1), x.cos(), x.mul_(2), x.tan()))
    edges = edges_of(model)
    nodes = {node.name: node for node in model.graph.nodes}
    order.stand_in(edges, [nodes["cos"]], [nodes["x"]])
    assert edges[nodes["x"]] == {nodes["add_"]}
    assert nodes["x"] in edges[nodes["mul_"]]
    assert nodes["cos"] not in edges


def test_depths():
    model = traced(lambda m, x: (x.sin().cos().sin(), x.sin()))
    depths = order.depths(model.graph, {}, lambda node: node.target == "sin")
    assert {node.name: depth for node, depth in depths.items() if node.target == "sin"} == {
        "sin": 0,
        "sin_1": 1,
        "sin_2": 0,
    }
