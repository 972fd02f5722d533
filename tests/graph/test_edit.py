"""One call and its split stand in the place of the siblings' calls."""

from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn

from conjoin.graph import edit


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, width) for width in (2, 3, 1))
        self.wide = nn.Linear(4, 6)

    def forward(self, x):
        y = x.relu()
        c = self.c(y)
        a, b = self.a(y), self.b(y)
        return {"all": [a, b, c], "sum": torch.cat([a, b, a], dim=-1), "c": c + 1}


def edited():
    model = Three().double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            blocks = [getattr(layer, name) for layer in (model.a, model.b, model.c)]
            getattr(model.wide, name).copy_(torch.cat(blocks))
    graph = fx.Tracer().trace(model)
    calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
    siblings = [calls[name] for name in "abc"]
    for node in graph.nodes:
        node.meta["kept"] = node.name

    kind = SimpleNamespace(split=lambda wide: (torch.split, ([2, 3, 1], -1)))
    wide = SimpleNamespace(kind=kind, contiguous=frozenset({1}))
    edit.replace(graph, siblings, "wide", wide)
    return model, graph


def test_the_function_stays_the_same():
    model, graph = edited()
    graph.lint()
    x = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = fx.GraphModule(model, graph)(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_one_call_is_left_where_the_first_was():
    _, graph = edited()
    targets = [node.target for node in graph.nodes if node.op.startswith("call")]
    assert targets.count("wide") == 1
    assert not {"a", "b", "c"} & set(targets)
    assert targets[:3] == ["relu", "wide", torch.split]


def test_the_parts_take_the_notes_of_the_siblings():
    _, graph = edited()
    parts = [n for n in graph.nodes if "getitem" in n.name or n.name == "clone"]
    assert {"a", "b", "c"} <= {node.meta.get("kept") for node in parts}


def test_a_part_is_made_contiguous_where_the_wide_layer_says_so():
    _, graph = edited()
    copies = [node for node in graph.nodes if node.target == "clone"]
    assert [node.args[0].args[1] for node in copies] == [1]


def test_code_runs_in_order():
    model, graph = edited()
    assert fx.GraphModule(model, graph).code.count("self.wide(") == 1


class Named(fx.GraphModule):
    """A module of a graph that has another module, which is no child."""

    named = nn.Linear(4, 4)


def test_modules_are_those_that_pytorch_finds():
    layer, empty = nn.Linear(4, 4), nn.ModuleList()
    graph = fx.Graph()
    graph.output(graph.call_module("0.a", (graph.placeholder("x"),)))
    module = Named({"0.a": layer}, graph)
    module.add_submodule("0.empty", empty)
    modules = edit.called_modules(module)
    assert modules == {"0.a": layer}
    assert modules["0.empty"] is empty
    assert modules["named"] is Named.named
    for missing in ("0.b", "1", "0.a.b", "0.a.weight"):
        with pytest.raises(AttributeError):
            modules[missing]
