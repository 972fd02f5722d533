"""One layer that is called with several tensors of one shape runs once, on all of them.

    y_i = f(x_i)                     becomes        y = f(X), X the x_i stacked;  y_i = y[i]

x_i: (..., in), X: (n, ..., in), y: (n, ..., out). The weights are those of f, once; no parameter
is touched. It is what Siamese networks do, shared embeddings, and a critic of two actions. What
follows runs once too: `Sink` moves the split below activations, and further calls of one layer
read the parts of one tensor:

    y_i = f(W[i])                    becomes        y = f(W);  y_i = y[i]

To stack tensors is a copy, so they are stacked only where that saves several launches. A forward
that is rewritten also looks at the sizes and shapes of what it is called with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import (
    bundles,
    channelwise,
    congruence,
    edit,
    elementwise,
    hazards,
    order,
    samplewise,
)
from conjoin.graph.bundles import Bundle
from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.graph.epochs import epochs_of
from conjoin.graph.rewriting import Rewrite

STACKED = 2**16
"""How many elements a stack, and what a layer makes of it, may have.

In float32 that is about what the cache next to a core holds. Beyond it, calls one by one find more
there than one call on the stack does: `batch_large` in the benchmark is such a model, and
`batch_small` one below."""

LEAST_SAVED = 10
"""More launches than these must be saved, by all layers that read one stack.

It takes time, too, to look at a call's inputs, to stack them and to cut what comes out, as much as
some launches do."""


class Batch(Rewrite):
    """Runs a layer once where it is called on several tensors of one shape."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; the layers stay what they are."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = epochs_of(graph, modules)
        changed = bundles.rework(graph, lambda bundle: _climb(graph, bundle, modules, epochs))
        # Calls that read parts go first: what they read needs no stacking.
        inputs: Inputs | None = graph_module.meta.get(INPUTS, Inputs())
        if not changed and inputs is not None:
            changed = _gather(graph, modules, inputs)
        return PassResult(graph_module, changed)


def _climb(
    graph: fx.Graph,
    bundle: Bundle,
    modules: Mapping[str, nn.Module],
    epochs: Mapping[fx.Node, int],
) -> list[fx.Node]:
    """Runs a layer once that reads parts of one stack; the splits that there are then."""
    if bundle.dim is not None:
        return []

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        same = epochs[node] == epochs[bundle.split]
        return samplewise.key(node, part, modules) if same else None

    for positions in bundles.runs(bundle, key):
        users = bundles.readers(bundle, positions)
        inner = bundles.carve(graph, bundle, positions.start, positions.stop)
        with graph.inserting_before(inner.split):
            whole = graph.call_module(str(users[0].target), (inner.whole,))
        return bundles.replace(graph, inner, users, whole, inner.sizes, None)
    return []


def _gather(graph: fx.Graph, modules: Mapping[str, nn.Module], inputs: Inputs) -> bool:
    """Runs a layer once whose calls read tensors of one shape and depend on no other call of it.

    Returns:
        Whether there was any.
    """
    calls = _calls(graph, modules)
    if not calls:
        return False
    edges, epochs = order.constraints(graph, modules), epochs_of(graph, modules)
    shapes = congruence.classes(graph, modules, inputs.alike)
    depths = order.depths(graph, edges, calls.__contains__)
    groups: dict[Hashable, list[fx.Node]] = {}
    for node, call in calls.items():
        key = call, depths[node], epochs[node], shapes[_input(node)]
        groups.setdefault(key, []).append(node)
    gathered = _first(graph, edges, _worthwhile(groups.values(), modules))
    for users in gathered:
        layer = modules[str(users[0].target)]
        stack = _stacked(graph, users, samplewise.dims(layer), epochs)
        with graph.inserting_before(stack.next):
            whole = graph.call_module(str(users[0].target), (stack,))
            parts = bundles.cut(graph, whole, (1,) * len(users), None)
        order.stand_in(edges, users, (stack, whole, parts[0].all_input_nodes[0], *parts))
        bundles.substitute(graph, users, parts)
        order.sort(graph, edges)
        inputs.limit(STACKED // samplewise.growth(layer))
    return bool(gathered)


def _stacked(
    graph: fx.Graph, calls: Sequence[fx.Node], dims: int, epochs: Mapping[fx.Node, int]
) -> fx.Node:
    """What calls read, stacked once for all layers that read it."""
    inputs = [*map(_input, calls)]
    for user in inputs[0].users:
        same = user.target is bundles.batched and user.args == (inputs, dims)
        if same and epochs[user] == epochs[calls[0]]:
            return user
    with graph.inserting_after(max(inputs)):
        return graph.call_function(bundles.batched, (inputs, dims))


def _calls(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Hashable]:
    """Repeated calls of layers that act on each sample, and what is common to those to be one.

    What a frozen layer gives requires a gradient where its input does, be it one of several.
    """
    called = Counter(modules[str(n.target)] for n in graph.nodes if n.op == "call_module")
    layers: dict[fx.Node, nn.Module] = {}
    for node in graph.nodes:
        several = node.op == "call_module" and called[modules[str(node.target)]] > 1
        input = edit.only_input(node) if several else None
        layer = None if input is None else samplewise.key(node, input, modules)
        if layer is not None:
            layers[node] = layer
    if not layers:
        return {}
    trained = hazards.trained(graph, modules)
    return {
        node: (layer, node in trained)
        for node, layer in layers.items()
        if node not in trained or samplewise.trains(layer)
    }


def _worthwhile(
    groups: Iterable[list[fx.Node]], modules: Mapping[str, nn.Module]
) -> list[list[fx.Node]]:
    """The groups of calls on different tensors that save more at once than their stack costs."""
    readers: dict[tuple[fx.Node, ...], list[list[fx.Node]]] = {}
    for calls in groups:
        inputs = tuple(map(_input, calls))
        if len({*inputs}) == len(inputs) > 1:
            readers.setdefault(inputs, []).append(calls)
    return [
        calls
        for inputs, several in readers.items()
        if _are_parts(inputs) or _saves_enough(several, modules)
        for calls in several
    ]


def _input(call: fx.Node) -> fx.Node:
    return call.all_input_nodes[0]


def _first(graph: fx.Graph, edges: order.Edges, groups: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """The groups that depend on no other one; those behind them may read their parts then."""
    depths = order.depths(graph, edges, {node for users in groups for node in users}.__contains__)
    return [users for users in groups if not any(depths[user] for user in users)]


def _saves_enough(several: list[list[fx.Node]], modules: Mapping[str, nn.Module]) -> bool:
    """Whether it saves enough to run calls that read one stack, and what follows them, at once."""
    pending, saved = list(several), 0
    while pending and saved <= LEAST_SAVED:
        calls = pending.pop()
        saved += len(calls) - 1
        readers = [list(call.users) for call in calls]
        sequels = [[_sequel(each, call, modules) for each in call.users] for call in calls]
        if None not in sequels[0] and all(each == sequels[0] for each in sequels):
            pending += [list(together) for together in zip(*readers, strict=True)]
    return saved > LEAST_SAVED


def _are_parts(nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes are all parts of one stack, so that to stack them again costs nothing."""
    bundle = bundles.bundle_at(nodes[0].all_input_nodes[0]) if nodes[0].all_input_nodes else None
    return bundle is not None and bundle.dim is None and list(bundle.parts) == [*nodes]


def _sequel(reader: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]) -> Hashable | None:
    """What a node does to a part, if it may be done to all parts at once."""
    return (
        samplewise.key(reader, part, modules)
        or elementwise.key(reader, part, modules)
        or channelwise.softmax_key(reader, part, modules)
    )
