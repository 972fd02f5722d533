"""Moves cuts back above activations, for compilers that fuse activations themselves.

    y = f(W);  y_i = y[i];  z_i = g(y_i)      becomes      p_i = W[i];  y_i = f(p_i);  z_i = g(y_i)

for f that acts element by element and g a product. A compiler launches nothing for f by itself. But
where a step of training goes through it, it keeps for the backward pass what g reads, y_i, and what
f needs of y, and does not see that these are the same numbers: for tanh it keeps them twice, and
for ReLU it writes a mask of bytes beside them, which Inductor does one by one on a CPU. `mmoe_8`
and `twin_critics_256` are models in the benchmark where that matters, in training under
`torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import fx, nn

from conjoin.graph import bundles, elementwise
from conjoin.graph.bundles import Bundle
from conjoin.graph.epochs import Epochs, epochs_of
from conjoin.layers import KINDS, PRODUCTS, kind_of
from conjoin.layers.wide import Wide


def rise(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    """Moves cuts above what acts on each element, where a product reads what is cut.

    Args:
        graph: a rewritten graph, changed in place.
        modules: the modules that it calls, by target.

    Returns:
        Whether there was any.
    """
    changed = False
    while _rise_once(graph, modules):
        changed = True
    return changed


def _rise_once(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> bool:
    epochs, changed = epochs_of(graph, modules), False
    for node in reversed([*graph.nodes]):
        if node._erased:
            continue
        if (bundle := bundles.bundle_at(node)) is not None:
            changed |= _cut_before(graph, bundle, modules, epochs)
        elif _is_product(node, modules):
            changed |= _stack_before(graph, node, modules, epochs)
    return changed


def _cut_before(
    graph: fx.Graph, bundle: Bundle, modules: Mapping[str, nn.Module], epochs: Epochs
) -> bool:
    """Cuts before what acts on the elements of the whole."""
    readers = (user for part in bundle.parts for user in part.users)
    above = [*_above(bundle.whole, bundle.split, modules, epochs)]
    if not above or not any(_is_for_product(reader, modules) for reader in readers):
        return False
    with graph.inserting_before(above[-1]):
        parts = bundles.cut(graph, above[-1].all_input_nodes[0], bundle.sizes, bundle.dim)
        made = [_again(graph, above[::-1], part) for part in parts]
    bundles.substitute(graph, bundle.parts, made)
    for node in (bundle.split, *above):
        graph.erase_node(node)
    return True


def _stack_before(
    graph: fx.Graph, product: fx.Node, modules: Mapping[str, nn.Module], epochs: Epochs
) -> bool:
    """Makes a stack before what acts on the elements of what lies side by side."""
    read = product.all_input_nodes[:1]  # Nothing, where it is given None.
    views = bundles.stacked_from(read[0]) if read else []
    above = [*_above(views[0].all_input_nodes[0], views[-1], modules, epochs)] if views else []
    if not above:
        return False
    with graph.inserting_before(above[-1]):
        made = _again(graph, [*views, *reversed(above)], above[-1].all_input_nodes[0])
    bundles.substitute(graph, [views[-1]], [made])
    for node in (*reversed(views[:-1]), *above):
        graph.erase_node(node)
    return True


def _above(
    whole: fx.Node, reader: fx.Node, modules: Mapping[str, nn.Module], epochs: Epochs
) -> Iterator[fx.Node]:
    """What acts on each element of a wide tensor and has one reader, from the last one on."""
    node = whole
    while len(node.users) == 1 and len(node.all_input_nodes) == 1:
        input = node.all_input_nodes[0]
        known = elementwise.key(node, input, modules) is not None and len(input.users) == 1
        if not known or epochs[node] != epochs[reader]:
            return
        yield node
        node = input


def _again(graph: fx.Graph, nodes: Sequence[fx.Node], input: fx.Node) -> fx.Node:
    """What nodes do to one another's output, done to an input."""
    for node in nodes:
        input = graph.node_copy(node, lambda _, made=input: made)  # type: ignore[misc]
    return input


def _is_for_product(reader: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a reader is a product, or stacks what it reads for one."""
    while reader.target in bundles.STACKING and len(reader.users) == 1:
        reader = next(iter(reader.users))
    return _is_product(reader, modules)


def _is_product(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is a call of a layer that multiplies."""
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    if isinstance(module, Wide):
        return module.kind.siblings
    return kind_of(module, (*KINDS, *PRODUCTS)) is not None
