"""Siblings become one wide layer followed by a split.

    y_1 = a(x);  y_2 = b(x)        becomes        y = wide(x);  y_1, y_2 = split(y)

x: (..., in), y_i: (..., out_i), y: (..., sum out_i). The wide layer stands where the first sibling
stood, so what is done to x between the siblings must leave it as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import cast

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit, elementwise, hazards, joints, products, strides
from conjoin.graph.epochs import epochs_of
from conjoin.graph.rewriting import Rewrite
from conjoin.graph.siblings import Candidate, among
from conjoin.graph.site import Sightings, Site
from conjoin.keys import layer_key, norm_key
from conjoin.layers import GATHERED, kind_of
from conjoin.layers.embedding import Embedding
from conjoin.layers.product import SUFFIX
from conjoin.layers.view import View
from conjoin.layers.wide import WIDE, Wide
from conjoin.merging import Merger, merger_of
from conjoin.policy.gathering import launches_fewer

FORESIGHT = 8
"""How many operations behind siblings are looked at, to put those that go on alike together."""


class Widen(Rewrite):
    """Merges layers that read one tensor, and runs each wide layer once.

    A wide layer is left to its views where some of them are not called on the same tensor, where
    something stands between them that might change it, or where it depends on the input if one run
    pays and is not known to: what the views compute is the same, in more launches.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; the layers are merged."""
        merger = merger_of(graph_module)
        _merge_products(graph_module, merger)
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = epochs_of(graph, modules)
        _merge_siblings(graph_module, modules, epochs, merger)
        whole = list(_whole(graph, modules, epochs))
        for siblings in whole:
            siblings, wide = _in_order(siblings, modules, merger)
            edit.replace(graph, siblings, f"{min(siblings).target}.{WIDE}", wide)
        return PassResult(graph_module, bool(whole))


def _merge_products(graph_module: fx.GraphModule, merger: Merger) -> None:
    """Merges the products with Parameters that read one tensor, and calls them as layers."""
    graph = graph_module.graph
    inputs = Counter(call.input for call in products.calls(graph))
    if max(inputs.values(), default=0) < 2 or products.tells_offsets(graph) or not merger.lends:
        return
    found = merger.raw_products(graph_module)
    modules = edit.called_modules(graph_module)
    versions, epochs = hazards.follow(graph, modules)[0], epochs_of(graph, modules)
    sites = [
        Site(product.name, call.input, versions[call.node], epochs[call.node])
        for call, product in found.items()
    ]
    merger.merge_products(list(found.values()), sites)
    lent: dict[str, tuple[str, str]] = {}
    layers: dict[str, nn.Module] = {}
    for call, product in found.items():
        if isinstance(product.layer, View):
            target = f"{call.weight.target}{SUFFIX}"
            layers[target] = product.layer
            graph_module.add_submodule(target, product.layer)
            nodes = {"weight": call.weight, "bias": call.bias}
            lent |= {str(n.target): (target, tensor) for tensor, n in nodes.items() if n}
    products.call(graph, lent, layers)


def _merge_siblings(
    graph_module: fx.GraphModule,
    modules: Mapping[str, nn.Module],
    epochs: Mapping[fx.Node, int],
    merger: Merger,
) -> None:
    """Merges the layers that are seen to be siblings in this graph only."""
    readers: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        input = edit.only_input(node) if node.op == "call_module" else None
        layer = modules.get(str(node.target))
        if input is None or isinstance(layer, View) or merger.leaves(layer):
            continue
        if kind_of(layer, merger.kinds):
            readers[node] = input
    if len({*readers.values()}) == len(readers):
        return
    sites = [Site(str(node.target), input, epochs[node]) for node, input in readers.items()]
    strided = _strided(graph_module, modules, readers, merger)
    called = {site.layer: modules[site.layer] for site in sites}
    seen = Sightings(tuple(sites), strided, shapes=merger.shapes(called))
    found = [*among(called, merger.shared(called), seen, merger.kinds)]
    columns = sum(isinstance(candidate.kind, Embedding) for candidate in found)
    for candidate in found:
        if candidate.refusal is None and not _waits(candidate, columns, merger):
            layers = [modules[name] for name in candidate.layers]
            merger.wide(candidate.kind, layers, contiguous=candidate.contiguous, together=True)


def _strided(
    graph_module: fx.GraphModule,
    modules: Mapping[str, nn.Module],
    readers: Mapping[fx.Node, fx.Node],
    merger: Merger,
) -> dict[str, str]:
    """What reads the strides of layers' outputs, by the layers' names.

    Args:
        graph_module: the graph.
        modules: the modules that it calls, by target.
        readers: the calls of the layers, and what they read.
        merger: what would merge them.
    """
    found: dict[fx.Node, str] = {}
    dims: dict[fx.Node, dict[fx.Node, int]] = {}
    escapes = merger.escapes(graph_module)
    for node, input in readers.items():
        kind = kind_of(modules[str(node.target)], merger.kinds)
        dim = None if kind is None else kind.output_dim
        if why := strides.reads_strides(node, modules, escapes=escapes, dim=dim):
            found[node] = why
            if dim is not None:
                dims.setdefault(input, {})[node] = dim
    for siblings in dims.values():
        if strides.unnoticed(graph_module.graph, siblings, modules):
            found = {node: why for node, why in found.items() if node not in siblings}
    return {str(node.target): why for node, why in found.items()}


def _waits(candidate: Candidate, columns: int, merger: Merger) -> bool:
    """Whether siblings are left to `Towers`.

    Those are tables, where all columns at once are fewer launches than all tables of each column,
    or where a wide table would be read one by one.

    Args:
        candidate: the siblings.
        columns: how many tensors tables read that are siblings.
        merger: what would merge them.
    """
    if not isinstance(candidate.kind, Embedding):
        return False
    one_by_one = candidate.kind.reads_one_by_one(candidate.widths, training=merger.training)
    return launches_fewer(GATHERED[0], columns) or one_by_one


def _whole(
    graph: fx.Graph, modules: Mapping[str, nn.Module], epochs: Mapping[fx.Node, int]
) -> Iterator[list[fx.Node]]:
    """The calls, on one tensor, of all views of a wide layer, in their order."""
    calls: dict[tuple[Wide, fx.Node, int], dict[int, fx.Node]] = {}
    for node in graph.nodes:
        view = modules[str(node.target)] if node.op == "call_module" else None
        if isinstance(view, View) and not hazards.is_opaque(view) and _runs_once(view.wide_layer):
            input = edit.only_input(node)
            if input is not None:
                key = view.wide_layer, input, epochs[node]
                calls.setdefault(key, {}).setdefault(view.conjoin_index, node)
    for (wide, _, _), group in calls.items():
        if len(group) == len(wide.widths):
            yield [group[index] for index in range(len(group))]


def _runs_once(wide: Wide) -> bool:
    return wide.together and (wide.paid or not wide.varies)


def _in_order(
    siblings: list[fx.Node], modules: Mapping[str, nn.Module], merger: Merger
) -> tuple[list[fx.Node], Wide]:
    """Siblings in an order in which those that go on alike are neighbours, and their wide layer.

    Of those that go on alike, each has the place that it has in a joint of theirs.
    """
    sequels = [_sequel(sibling, modules, merger) for sibling in siblings]
    numbers: dict[Hashable, int] = {}
    for sequel in sequels:
        for step in sequel:
            numbers.setdefault(step, len(numbers))
    steps = [[numbers[step] for step in sequel] for sequel in sequels]
    places = joints.places(siblings)
    order = sorted(range(len(siblings)), key=lambda i: (steps[i], places[i]))
    merger.reorder([modules[str(sibling.target)] for sibling in siblings], order)
    views = [modules[str(sibling.target)] for sibling in siblings]
    wide = cast(View, views[0]).wide_layer
    place = [cast(View, view).conjoin_index for view in views]
    return [siblings[place.index(index)] for index in range(len(siblings))], wide


def _sequel(
    node: fx.Node, modules: Mapping[str, nn.Module], merger: Merger
) -> tuple[Hashable, ...]:
    """What happens to the output of a layer, as long as it is read by one node that is known."""
    steps: list[Hashable] = []
    while len(node.users) == 1 and len(steps) < FORESIGHT:
        user = next(iter(node.users))
        step = (
            elementwise.key(user, node, modules)
            or layer_key(user, node, modules, merger)
            or norm_key(user, node, modules)
        )
        named = modules[str(user.target)] if user.op == "call_module" else user.target
        step = step or (user.op, type(named) if user.op == "call_module" else named)
        steps.append((len(steps), step))
        node = user
    return tuple(steps)
