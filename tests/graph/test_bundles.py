"""A wide tensor and its parts, as they are found and cut in a graph."""

import operator

import pytest
import torch
from torch import fx

from conjoin.graph import bundles
from conjoin.layers.embedding import unstack


def graph_of(count, dim, read=None):
    """The graph in which a wide tensor is cut, and some of its parts are read."""
    graph = fx.Graph()
    whole = graph.call_method("clone", (graph.placeholder("x"),))
    parts = bundles.cut(graph, whole, (2,) * count if dim is not None else (1,) * count, dim)
    read = range(count) if read is None else read
    graph.output([graph.call_method("sin", (parts[i],)) for i in read])
    return graph, parts[0].args[0]


def run(graph, x):
    return fx.GraphModule(torch.nn.Module(), graph)(x)


@pytest.mark.parametrize("dim", [-1, -2, None])
def test_found(dim):
    graph, split = graph_of(3, dim)
    (found,) = bundles.bundles(graph)
    assert (found.split, found.dim, len(found.parts)) == (split, dim, 3)
    assert found.equal
    assert found.sizes == ((1,) * 3 if dim is None else (2,) * 3)


def test_not_found_where_parts_are_gone():
    """A pass of somebody else's has taken out those that nobody reads."""
    for dim in (-1, None):
        graph, _ = graph_of(3, dim, read=(0, 1))
        assert len(list(bundles.bundles(graph))) == 1
        graph.eliminate_dead_code()
        assert list(bundles.bundles(graph)) == []


def test_not_found_where_the_whole_is_read():
    graph, split = graph_of(2, -1)
    with graph.inserting_after(split):
        graph.call_method("sin", (split.args[0],))
    assert bundles.bundle_at(split) is None


def test_not_found_where_several_parts_are_read_at_once():
    graph = fx.Graph()
    split = graph.call_function(torch.unsafe_split_with_sizes, (graph.placeholder("x"), [2, 2], -1))
    graph.output(graph.call_function(operator.getitem, (split, slice(0, 2))))
    assert bundles.bundle_at(split) is None


@pytest.mark.parametrize("dim", [-1, -2, None])
@pytest.mark.parametrize(("start", "stop"), [(0, 2), (1, 3), (2, 4), (0, 4), (0, 3), (1, 4)])
def test_carve(dim, start, stop):
    graph, split = graph_of(4, dim)
    x = torch.randn(4, 8) if dim is None else torch.randn(8, 8)
    expected = run(graph, x)
    made = bundles.carve(graph, bundles.bundle_at(split), start, stop)
    graph.lint()
    assert len(made.parts) == stop - start
    assert made.dim == dim
    torch.testing.assert_close(run(graph, x), expected, rtol=0, atol=0)


def test_carve_again():
    graph, split = graph_of(4, -1)
    x = torch.randn(3, 8)
    expected = run(graph, x)
    made = bundles.carve(graph, bundles.bundle_at(split), 0, 3)
    bundles.carve(graph, made, 1, 3)
    graph.lint()
    torch.testing.assert_close(run(graph, x), expected, rtol=0, atol=0)


RUNS = {"aabb": [(0, 2), (2, 4)], "abab": [], "aaa": [(0, 3)], "-aa-": [(1, 3)], "--": [], "a": []}


@pytest.mark.parametrize(("keys", "expected"), RUNS.items())
def test_runs(keys, expected):
    _, split = graph_of(max(len(keys), 2), -1)
    found = bundles.bundle_at(split)
    known = dict(zip(found.parts, keys, strict=False))

    def key(node, part, size):
        return None if known.get(part, "-") == "-" else known[part]

    assert [(each.start, each.stop) for each in bundles.runs(found, key)] == expected


def test_side_by_side_and_stacked():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((bundles.side_by_side(graph, x), bundles.stacked(graph, x, 2)))
    x = torch.randn(3, 5, 4)
    beside, stack = run(graph, x)
    torch.testing.assert_close(beside, torch.cat(list(x), -1))
    torch.testing.assert_close(stack, torch.stack(list(x.split(2, -1))))


def test_a_graph_that_is_traced_again_keeps_the_cut():
    graph, _ = graph_of(3, None)
    again = fx.symbolic_trace(fx.GraphModule(torch.nn.Module(), graph))
    assert [node.target for node in again.graph.nodes].count(unstack) == 1
