"""The entries of a node's `meta` that hold the node's value, as a fake tensor."""

from typing import Any

from torch import fx

VALUE = "val"
"""In graphs of `torch.export` and `make_fx`."""

EXAMPLE = "example_value"
"""In those of Dynamo."""


def value_of(node: fx.Node) -> Any:
    """The value of a node in a graph of either; None where the graph does not tell."""
    return node.meta.get(EXAMPLE, node.meta.get(VALUE))
