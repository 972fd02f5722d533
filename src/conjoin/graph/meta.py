"""Where a node's `meta` holds its value, as a fake tensor."""

from typing import Any

from torch import Tensor, fx
from torch._C._functorch import is_functorch_wrapped_tensor

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


def is_wrapped(value: object) -> bool:
    """Whether a value is a functorch transform's, such as a batch that `vmap` goes through."""
    return isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)


def storage_of(tensor: Tensor) -> int | None:
    """What a tensor lies in, as a number; None where a transform does not tell."""
    return None if is_wrapped(tensor) else tensor.untyped_storage()._cdata
