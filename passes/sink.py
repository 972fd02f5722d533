"""The split moves below what all branches do alike.

    p_i = W[i];  y_i = f(p_i)        becomes        y = f(W);  y_i = y[i]

for f that acts on each element, on the space of each channel, or on each channel by itself. Where
only neighbouring branches go on alike, the split is made in two steps, and theirs moves. What
draws random numbers stays where it is, since it would draw others.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import cast

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from conjoin.graph import bundles, channelwise, edit, elementwise, hazards
from conjoin.graph.bundles import Bundle
from conjoin.layers import norm_of
from conjoin.layers.wide import WIDE, View, Wide
from conjoin.merging import Merger, merger_of


class Sink(PassBase):
    """Moves splits below activations, pooling, padding, softmax and normalizations."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; equal normalizations of the branches are merged."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = hazards.epochs(graph, modules)
        merger = merger_of(graph_module)
        changed = bundles.rework(
            graph, lambda bundle: _sink(graph, bundle, modules, epochs, merger)
        )
        return PassResult(graph_module, changed)


def _sink(
    graph: fx.Graph,
    bundle: Bundle,
    modules: Mapping[str, nn.Module],
    epochs: Mapping[fx.Node, int],
    merger: Merger,
) -> list[fx.Node]:
    """Moves one split below one operation; the splits that there are then, if there was one."""

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        if epochs[node] != epochs[bundle.split]:
            return None
        # Autograd would not notice that a part of what it keeps for backward was changed.
        if elementwise.saves_output(node, modules) and hazards.is_seen(node, modules):
            return None
        norm = _norm_key(node, part, modules)
        # A stack consists of contiguous parts; what lies side by side does not.
        beside = bundle.dim is not None or norm is not None
        if beside and _reads_strides(node, modules):
            return None
        return (
            norm
            or elementwise.key(node, part, modules)
            or channelwise.key(node, part, bundle.dim, modules)
            or _softmax_key(node, part, size, modules)
        )

    for positions in bundles.runs(bundle, key):
        if made := _move(graph, bundle, positions, modules, merger):
            return made
    return []


def _reads_strides(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what reads a node's output could tell a slice from a tensor of its own."""
    reader = next(iter(node.users), None)
    if reader is not None and len(node.users) == 1 and hazards.merges_channels(reader, modules):
        node = reader
    return bool(hazards.reads_strides(node, modules, escapes=True))


def _softmax_key(
    node: fx.Node, part: fx.Node, size: int, modules: Mapping[str, nn.Module]
) -> Hashable | None:
    """A softmax, which must be along the channels of parts of equal size."""
    found = channelwise.softmax_key(node, part, modules)
    return None if found is None else (*found, size)


def _norm_key(node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]) -> Hashable | None:
    """A normalization with a weight, whose blocks become one."""
    if node.op != "call_module" or edit.only_input(node) is not part:
        return None
    module = modules[str(node.target)]
    kind = norm_of(module)
    if kind is None or module.weight is None:
        return None
    return kind, module.training, tuple(kind.key(module).items())


def _width(stack: fx.Node, modules: Mapping[str, nn.Module]) -> int:
    """The size of the last dimension of stacked parts; 0 where it is not known."""
    node = stack
    while node.args and isinstance(input := node.args[0], fx.Node):
        wide = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(wide, Wide):
            return wide.widths[0] if wide.kind.output_dim == -1 else 0
        if elementwise.key(node, input, modules) is None:
            return 0
        node = input
    return 0


def _called_between(
    split: fx.Node,
    users: Sequence[fx.Node],
    layers: Sequence[nn.Module],
    modules: Mapping[str, nn.Module],
) -> bool:
    """Whether layers are also called where their calls would be moved past."""
    same = {*layers, *(layer.wide_layer for layer in layers if isinstance(layer, View))}
    between = split.next
    while between is not max(users):
        called = between.op == "call_module" and between not in users
        if called and modules[str(between.target)] in same:
            return True
        between = between.next
    return False


def _move(
    graph: fx.Graph,
    bundle: Bundle,
    positions: range,
    modules: Mapping[str, nn.Module],
    merger: Merger,
) -> list[fx.Node]:
    """Moves the split of the parts at some positions below what they are read by."""
    users = bundles.readers(bundle, positions)
    part = bundle.parts[positions.start]
    layers = [modules[str(user.target)] for user in users if user.op == "call_module"]
    kind = norm_of(layers[0]) if layers else None
    sizes = [bundle.sizes[i] for i in positions]
    if kind is not None:
        widths = [cast(Tensor, layer.weight).shape[0] for layer in layers]
        if bundle.dim is None:
            sizes = [_width(bundle.whole, modules)] * len(sizes)
        if widths != sizes:
            return []
        if kind.running and _called_between(bundle.split, users, layers, modules):
            return []
        if merger.wide(kind, layers, together=False) is None:
            return []
    softmax = channelwise.softmax_key(users[0], part, modules)
    inner = bundles.carve(graph, bundle, positions.start, positions.stop)
    dim = inner.dim
    with graph.inserting_before(inner.split):
        if kind is not None:
            whole = inner.whole if dim is not None else bundles.side_by_side(graph, inner.whole)
            target = f"{users[0].target}.{WIDE}"
            dim = -1 if dim is None else dim
            result = graph.call_module(target, (whole,), {"dim": dim})
        elif softmax is not None:
            arguments = (inner.whole, *softmax, len(inner.parts), dim)
            result = graph.call_function(channelwise.softmax_of_parts, arguments)
        else:
            result = graph.node_copy(users[0], lambda node: inner.whole)
    return bundles.replace(graph, inner, users, result, sizes, dim)
