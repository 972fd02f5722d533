"""Operations on the parameters of a layer become calls of the layer.

    y = aten.linear(x, a.weight, a.bias)        becomes        y = a(x)
    y = F.conv2d(x, a.weight, a.bias, 2)        becomes        y = a(x)

for a module a of the graph that holds these tensors and nothing else, as in the graphs of
`torch.export` and in those of functional code. The layers stand at the modules' names, so
`state_dict` keeps its keys. The other passes know layers by their calls, so this one goes first;
it is in no pipeline, since a graph in which nothing is merged then is better left as it was.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit
from conjoin.graph.rewriting import Rewrite
from conjoin.tracing.exported import raise_


class Lift(Rewrite):
    """Finds the layers behind operations that read the parameters of one module."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place, and puts layers where modules hold their tensors."""
        made = raise_(graph_module, fixed=False)
        graph = graph_module.graph
        edit.erase_unread(graph, [node for node in graph.nodes if node.op == "get_attr"])
        return PassResult(graph_module, bool(made))
