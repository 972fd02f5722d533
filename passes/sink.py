"""The split moves below what all branches do alike.

    p_i = W[i];  y_i = f(p_i)        becomes        y = f(W);  y_i = y[i]

for f that acts on each element, on the space of each channel, or on each channel by itself, also
with weights of the branches' own, as normalizations and PReLU have, which are merged then. Where
only neighbouring branches go on alike, the split is made in two steps, and theirs moves. What
draws random numbers stays where it is, since it would draw others.

In Dynamo's graphs the split moves only to a joint that `Cancel` takes out with it. Under Inductor
on one core, four 1x1 convolutions or eight Linear, each with an activation and then joined, take
0.88 to 0.93 of the time so, forward and in training. Elsewhere a compiler has nothing of it: it
launches nothing for what acts on elements, and in training it keeps what f gave twice, once for the
backward pass of f and once, cut, for what reads the parts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import bundles, channelwise, edit, elementwise, functional, hazards, strides
from conjoin.graph.bundles import Bundle
from conjoin.graph.epochs import Epochs
from conjoin.graph.meta import EXAMPLE, is_of_dynamo
from conjoin.graph.rewriting import Rewrite
from conjoin.keys import norm_key
from conjoin.layers import norm_of
from conjoin.layers.view import View
from conjoin.layers.wide import WIDE, Wide
from conjoin.merging import Merger, merger_of
from conjoin.passes import cancel


class Sink(Rewrite):
    """Moves splits below activations, pooling, padding, softmax and normalizations."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; equal normalizations of the branches are merged."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = functional.epochs(graph, modules)
        if is_of_dynamo(graph):
            changed = bundles.rework(
                graph, lambda bundle: _sink_to_joint(graph, bundle, modules, epochs)
            )
            return PassResult(graph_module, changed)
        merger = merger_of(graph_module)
        changed = bundles.rework(
            graph, lambda bundle: _sink(graph, bundle, modules, epochs, merger)
        )
        return PassResult(graph_module, changed)


def _sink(
    graph: fx.Graph,
    bundle: Bundle,
    modules: Mapping[str, nn.Module],
    epochs: Epochs,
    merger: Merger,
) -> list[fx.Node]:
    """Moves one split below one operation; the splits that there are then, if there was one."""

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        return sequel(node, part, size, bundle, modules, epochs)

    for positions in bundles.runs(bundle, key):
        if made := move(graph, bundle, positions, modules, merger):
            return made
    return []


def _sink_to_joint(
    graph: fx.Graph, bundle: Bundle, modules: Mapping[str, nn.Module], epochs: Epochs
) -> list[fx.Node]:
    """Moves one split below one operation, if a joint behind it goes then."""
    ways = {part: onward(bundle, i, modules, epochs) for i, part in enumerate(bundle.parts)}

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        keys, nodes = ways[part]
        joint = next(iter(nodes[-1].users), None)
        return (keys, joint) if keys and joint is not None else None

    for positions in bundles.runs(bundle, key):
        branches = [ways[bundle.parts[i]][1] for i in positions]
        joint = next(iter(branches[0][-1].users))
        if cancel.takes_out(joint, bundle, branches, modules, epochs):
            return move(graph, bundle, positions, modules)
    return []


def onward(
    bundle: Bundle, position: int, modules: Mapping[str, nn.Module], epochs: Epochs
) -> tuple[tuple[Hashable, ...], list[fx.Node]]:
    """What is done to a part in turn, as long as the split may move below it.

    Returns:
        What is done, and the nodes of the part and of what comes of it.
    """
    keys: list[Hashable] = []
    nodes, size = [bundle.parts[position]], bundle.sizes[position]
    while len(nodes[-1].users) == 1:
        user = next(iter(nodes[-1].users))
        if (key := sequel(user, nodes[-1], size, bundle, modules, epochs)) is None:
            break
        keys.append(key)
        nodes.append(user)
    return tuple(keys), nodes


def sequel(
    node: fx.Node,
    part: fx.Node,
    size: int,
    bundle: Bundle,
    modules: Mapping[str, nn.Module],
    epochs: Epochs,
) -> Hashable | None:
    """What a node does to a part of some size, or to what comes of it; equal for what is alike.

    None where the split may not move below it.
    """
    if epochs[node] != epochs[bundle.split]:
        return None
    # Autograd would not notice that a part of what it keeps for backward was changed.
    if elementwise.saves_output(node, modules) and hazards.is_seen(node, modules):
        return None
    norm = _norm_key(node, part, bundle.dim, modules)
    # A stack consists of contiguous parts; what lies side by side does not.
    beside = bundle.dim is not None or norm is not None
    if beside and _reads_strides(node, modules):
        return None
    return (
        norm
        or elementwise.key(node, part, modules)
        or channelwise.key(node, part, bundle.dim, modules)
        or _of_parts(node, part, bundle.dim, size, modules)
    )


def _reads_strides(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what reads a node's output could tell a slice from a tensor of its own."""
    reader = next(iter(node.users), None)
    if reader is not None and len(node.users) == 1 and strides.merges_channels(reader, modules):
        node = reader
    return bool(strides.reads_strides(node, modules, escapes=True))


def _of_parts(
    node: fx.Node, part: fx.Node, dim: int | None, size: int, modules: Mapping[str, nn.Module]
) -> Hashable | None:
    """What goes along the channels of each part, which must be of equal size; or along space."""
    images = channelwise.instance_norm_key(node, part, modules)
    if images is not None:
        channels, number, eps = images
        return (channels, eps) if (channels, number) == (dim, size) else None
    if softmax := channelwise.softmax_key(node, part, modules):
        return *softmax, size
    found = channelwise.layer_norm_key(node, part, modules) if dim in (None, -1) else None
    return None if found is None else (found, size)


def _norm_key(
    node: fx.Node, part: fx.Node, dim: int | None, modules: Mapping[str, nn.Module]
) -> Hashable | None:
    """A normalization with a weight, of channels that lie along `dim`."""
    found = norm_key(node, part, modules)
    if found is None or found[0].channels not in (None, -1 if dim is None else dim):
        return None
    return found


def _width(stack: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """The size of the last dimension of stacked parts; 0 where it is not known."""
    node = stack
    while node.args and isinstance(input := node.args[0], fx.Node):
        wide = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(wide, Wide):
            return wide.kind.outputs(wide)[0] if wide.kind.output_dim == -1 else 0
        if elementwise.key(node, input, modules) is None:
            return 0
        node = input
    return 0


def _overtakes(
    split: fx.Node,
    users: Sequence[fx.Node],
    layers: Sequence[nn.Module],
    modules: Mapping[str, nn.Module],
) -> bool:
    """Whether a call of a layer would be moved, up to a split, past another call of that layer."""
    for user, layer in zip(users, layers, strict=True):
        same = {layer, layer.wide_layer} if isinstance(layer, View) else {layer}
        between = split.next
        while between is not user:
            if between.op == "call_module" and modules[str(between.target)] in same:
                return True
            between = between.next
    return False


def _merge(
    bundle: Bundle,
    users: Sequence[fx.Node],
    sizes: Sequence[int],
    modules: Mapping[str, nn.Module],
    merger: Merger,
) -> dict[str, Any] | None:
    """Merges the normalizations of some parts.

    Returns:
        How their wide layer is called; None where they stay apart.
    """
    layers = [modules[str(user.target)] for user in users]
    kind = norm_of(layers[0])
    if kind is None or len(layers) < kind.least:
        return None
    widths = [cast(Tensor, layer.weight).shape[0] for layer in layers]
    spreads = kind.spreads(layers[0]) and all(sizes)
    if widths != sizes and not spreads:
        return None
    if kind.running and _overtakes(bundle.split, users, layers, modules):
        return None
    if merger.wide(kind, layers, together=False) is None:
        return None
    options = {"dim": -1 if bundle.dim is None else bundle.dim}
    return {**options, "sizes": sizes} if spreads else options


def move(
    graph: fx.Graph,
    bundle: Bundle,
    positions: range,
    modules: Mapping[str, nn.Module],
    merger: Merger | None = None,
) -> list[fx.Node]:
    """Moves the split of the parts at some positions below what they are read by.

    Args:
        graph: the graph.
        bundle: the bundle.
        positions: the positions of the parts, which are read by nodes with an equal `sequel`.
        modules: the modules that the graph calls, by target.
        merger: merges normalizations, where layers are called as layers.

    Returns:
        The splits that there are then, that of the parts first; none where it does not move.
    """
    users = bundles.readers(bundle, positions)
    part = bundle.parts[positions.start]
    sizes = [bundle.sizes[i] for i in positions]
    options: dict[str, Any] | None = None
    if merger is not None and norm_key(users[0], part, modules) is not None:
        if bundle.dim is None:
            sizes = [_width(bundle.whole, modules)] * len(sizes)
        options = _merge(bundle, users, sizes, modules, merger)
        if options is None:
            return []
    known = channelwise.of_parts(users[0], part, bundle.dim, len(users), modules)
    inner = bundles.carve(graph, bundle, positions.start, positions.stop)
    dim, whole = inner.dim, inner.whole
    with graph.inserting_before(inner.split):
        if options is not None:
            whole = whole if dim is not None else bundles.side_by_side(graph, whole)
            result = graph.call_module(f"{users[0].target}.{WIDE}", (whole,), options)
            dim = options["dim"]
        elif known is not None:
            function, arguments = known
            result = graph.call_function(function, (whole, *arguments))
        else:
            result = graph.node_copy(users[0], lambda _: whole)
            result.meta.pop(EXAMPLE, None)  # Which is that of a part.
    return bundles.replace(graph, inner, users, result, sizes, dim)
