"""Where a node's `meta` holds its value, as a fake tensor."""

from typing import Any

from torch import fx

VALUE = "val"
"""In graphs of `torch.export` and `make_fx`."""

EXAMPLE = "example_value"
"""In those of Dynamo."""


def is_of_dynamo(graph: fx.Graph) -> bool:
    """Whether a graph is one of Dynamo's, by what its inputs tell."""
    return any(EXAMPLE in node.meta for node in graph.find_nodes(op="placeholder"))


def value_of(node: fx.Node) -> Any:
    """The value of a node in a graph of either; None where the graph does not tell."""
    return node.meta.get(EXAMPLE, node.meta.get(VALUE))
