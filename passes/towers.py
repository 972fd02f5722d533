"""The next layers of the branches, which read different tensors, become one.

    y_i = f(p_i, W_i)                becomes        y = f(W), all W_i at once;  y_i = y[i]

Linear      p: (n, ..., in), W: (n, out, in)                        one batched product
Embedding   p: (n, ...), W_i: (rows_i, width)                       one table, with offsets
Conv        p: (batch, n * in, *space), W: (n * out, in, *kernel)   one convolution in n groups
LayerNorm   p: (..., n * c), W: (n * c)                             one of groups of channels

Layers of different widths stay apart: to pad all weights to the widest at each call costs more than
the launches that it saves.

The p_i are parts of one tensor, so that they lie there as the wide layer wants them; or tensors of
their own, which are of one shape because they are made alike (see `conjoin.graph.congruence`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import bundles, congruence, edit, hazards, joints, order, strides
from conjoin.graph.bundles import Bundle
from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.graph.epochs import epochs_of
from conjoin.graph.rewriting import Rewrite
from conjoin.keys import layer_key, norm_key, table_key
from conjoin.layers import GATHERED, Kind, Norm
from conjoin.layers.view import View
from conjoin.layers.wide import WIDE
from conjoin.merging import Merger, merger_of
from conjoin.policy.cost import Layout


class Towers(Rewrite):
    """Merges equal layers of the branches into a grouped convolution or a batched product."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; the layers are merged."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = epochs_of(graph, modules)
        merger = merger_of(graph_module)
        escapes = merger.escapes(graph_module)
        changed = bundles.rework(
            graph, lambda bundle: _climb(graph, bundle, modules, epochs, merger, escapes)
        )
        # Layers that read parts go first: what they read needs no stacking.
        inputs: Inputs | None = graph_module.meta.get(INPUTS, Inputs())
        changed = changed or _gather(graph, modules, merger, inputs or Inputs())
        return PassResult(graph_module, changed)


def _climb(
    graph: fx.Graph,
    bundle: Bundle,
    modules: Mapping[str, nn.Module],
    epochs: Mapping[fx.Node, int],
    merger: Merger,
    escapes: bool,
) -> list[fx.Node]:
    """Merges the layers that read the parts of one bundle; the splits that there are then."""

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        if epochs[node] != epochs[bundle.split]:
            return None
        found = layer_key(node, part, modules, merger)
        if found is None or not _fits(found[0], bundle):
            return None
        if not found[0].stacked and strides.reads_strides(node, modules, escapes=escapes):
            return None
        return found, size

    for positions in bundles.runs(bundle, key):
        users = bundles.readers(bundle, positions)
        layers = [modules[str(user.target)] for user in users]
        kind = merger.kind_of(layers[0])
        layout: Layout = "stack" if bundle.dim is None else "beside"
        if kind is None or merger.wide(kind, layers, together=False, layout=layout) is None:
            continue
        inner = bundles.carve(graph, bundle, positions.start, positions.stop)
        count = len(layers)
        with graph.inserting_before(inner.split):
            whole = inner.whole
            if kind.stacked and inner.dim is not None:
                whole = bundles.stacked(graph, whole, count)
            target = f"{users[0].target}.{WIDE}"
            result = graph.call_module(target, (whole,), {"apart": True})
        dim = None if kind.stacked else kind.output_dim
        sizes = [cast(Tensor, layer.weight).shape[kind.weight_dim] for layer in layers]
        return bundles.replace(graph, inner, users, result, sizes, dim)
    return []


def _gather(
    graph: fx.Graph, modules: Mapping[str, nn.Module], merger: Merger, given: Inputs
) -> bool:
    """Merges equal layers that read tensors of one shape; whether there were any."""
    calls = _calls(graph, modules, merger)
    if len({*calls.values()}) == len(calls):
        return False
    edges, epochs = order.constraints(graph, modules), epochs_of(graph, modules)
    for users in _alike(graph, modules, calls, edges, given):
        layers = [modules[str(user.target)] for user in users]
        kind = calls[users[0]][0]
        if kind in GATHERED and not merger.gathers(kind, layers):
            continue
        if merger.wide(kind, layers, together=False, layout="apart") is None:
            continue
        inputs = [user.all_input_nodes[0] for user in users]
        unchanged = len({epochs[node] for node in (*inputs, *users)}) == 1
        with graph.inserting_before(max(inputs).next):
            joint = _joined(graph, kind, inputs, unchanged)
            made = [*joint, *_at_once(graph, kind, layers, joint[-1], users)]
        order.stand_in(edges, users, made)
        bundles.substitute(graph, users, made[-len(users) :])
        order.sort(graph, edges)
        edit.erase_unread(graph, [*inputs, *(each for i in inputs for each in i.all_input_nodes)])
        return True
    return False


def _at_once(
    graph: fx.Graph,
    kind: Kind,
    layers: list[nn.Module],
    joint: fx.Node,
    users: list[fx.Node],
) -> list[fx.Node]:
    """Calls a wide layer on what was joined, and cuts what it gives; the nodes, the parts last."""
    target = f"{users[0].target}.{WIDE}"
    if isinstance(kind, Norm):
        whole = graph.call_module(target, (joint,), {"dim": -1})
        sizes = [cast(Tensor, layer.weight).shape[0] for layer in layers]
        parts = bundles.cut(graph, whole, sizes, -1)
    else:
        whole = graph.call_module(target, (joint,), {"apart": True})
        parts = bundles.cut(graph, whole, (1,) * len(layers), None)
    return [whole, *parts[0].all_input_nodes, *parts]


def _joined(
    graph: fx.Graph, kind: Kind, inputs: Sequence[fx.Node], unchanged: bool
) -> list[fx.Node]:
    """Joins tensors as layers of a kind want them; the nodes, what is joined last.

    Columns are joined as those of their table, and before they are made row numbers.

    Args:
        graph: the graph.
        kind: the kind.
        inputs: the tensors.
        unchanged: whether what they were made of is the same still.
    """
    if isinstance(kind, Norm):
        return [graph.call_function(bundles.beside, (list(inputs),))]
    if kind in GATHERED and (found := bundles.as_columns(inputs)) is not None:
        return [graph.call_function(bundles.columns, found)]
    sources = bundles.before_cast(inputs)
    if kind in GATHERED and unchanged and sources:
        before = _joined(graph, kind, sources, unchanged)
        return [*before, graph.call_method(str(inputs[0].target), (before[-1],))]
    return [graph.call_function(torch.stack, (list(inputs),))]


def _calls(
    graph: fx.Graph, modules: Mapping[str, nn.Module], merger: Merger
) -> dict[fx.Node, tuple[Kind, Hashable]]:
    """The only calls of layers that may run at once with their like."""
    counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    calls: dict[fx.Node, tuple[Kind, Hashable]] = {}
    for node in graph.nodes:
        input = edit.only_input(node) if node.op == "call_module" else None
        opaque = input is not None and hazards.is_opaque(modules[str(node.target)])
        if input is not None and counts[str(node.target)] == 1 and not opaque:
            found = _gathered_key(node, input, modules, merger)
            if found is not None:
                calls[node] = found
    return calls


def _alike(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    calls: Mapping[fx.Node, tuple[Kind, Hashable]],
    edges: order.Edges,
    given: Inputs,
) -> Iterator[list[fx.Node]]:
    """Calls of equal layers of which none depends on another, on different tensors of one shape.

    Row numbers are mostly inputs of the graph. That those are of one shape is taken for granted for
    the sake of tables only, since each call must be looked at then.
    """
    depths = order.depths(graph, edges, calls.__contains__)
    epochs = epochs_of(graph, modules)
    shapes = congruence.classes(graph, modules)
    granted = congruence.classes(graph, modules, given.alike)
    groups: dict[Hashable, list[fx.Node]] = {}
    for node, found in calls.items():
        shape = (granted if found[0] in GATHERED else shapes)[node.all_input_nodes[0]]
        groups.setdefault((found, depths[node], epochs[node], shape), []).append(node)
    for users in groups.values():
        inputs = [user.all_input_nodes[0] for user in users]
        kind = calls[users[0]][0]
        apart = kind in GATHERED or len({*inputs}) == len(inputs)
        if apart and len(users) >= kind.gathered:
            if len({shapes[input] for input in inputs}) > 1:
                given.limit(sys.maxsize)
            yield _in_order(users, modules)


def _gathered_key(
    node: fx.Node, input: fx.Node, modules: Mapping[str, nn.Module], merger: Merger
) -> tuple[Kind, Hashable] | None:
    """What a layer that reads a tensor of its own is; equal for layers that can run at once."""
    norm = norm_key(node, input, modules)
    if norm is not None:
        # What lies side by side is not contiguous; a stack consists of contiguous parts.
        apart = norm[0].gathered == 0 or strides.reads_strides(node, modules, escapes=True)
        return None if apart else norm
    found = table_key(node, input, modules, merger) or layer_key(node, input, modules, merger)
    return found if found is not None and found[0].stacked else None


def _in_order(users: list[fx.Node], modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Calls of layers in the order in which they are merged, or are to be: that of a joint."""
    layers = {user: modules[str(user.target)] for user in users}
    known = {user: layer.conjoin_index for user, layer in layers.items() if isinstance(layer, View)}
    places = dict(zip(users, joints.places(users), strict=True))
    return sorted(users, key=lambda user: (known.get(user, 0), places[user]))


def _fits(kind: Kind, bundle: Bundle) -> bool:
    """Whether parts lie as layers of a kind want them."""
    if bundle.dim is None:
        return bool(kind.stacked)
    return bundle.dim == kind.output_dim
