"""One call and its split stand in the place of the siblings' calls."""

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

    def split(whole):
        parts = torch.split(whole, [2, 3, 1], -1)
        return [parts[i] for i in range(3)]

    edit.replace(graph, siblings, calls["c"], "wide", siblings[0].args[0], split)
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
    notes = {node.meta.get("kept") for node in graph.nodes if "getitem" in node.name}
    assert notes == {"a", "b", "c"}


def test_code_runs_in_order():
    model, graph = edited()
    assert fx.GraphModule(model, graph).code.count("self.wide(") == 1
