"""Where branches end."""

import torch
from torch import fx, nn

from conjoin.graph.joints import places


class Branches(nn.Module):
    def forward(self, a, b, c, d, e):
        joint = torch.cat([c.sin(), a], 1)
        read_twice = d.sin()
        return joint, torch.stack([b.cos().neg(), joint], 0), read_twice + read_twice.cos() + e


def test_places():
    graph = fx.symbolic_trace(Branches()).graph
    cat, stack = (next(n for n in graph.nodes if n.name == name) for name in ("cat", "stack"))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    assert places(inputs) == [(cat, 1), (stack, 0), (cat, 0), (), ()]


def test_a_thousand_branches_with_a_long_way_in_common():
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(1000)]
    total = inputs[0]
    for node in inputs[1:]:
        total = graph.call_method("add", (total, node))
    for _ in range(1000):
        total = graph.call_method("sin", (total,))
    joint = graph.call_function(torch.cat, ([total],))
    graph.output(joint)
    assert {*places(inputs)} == {(joint, 0)}
