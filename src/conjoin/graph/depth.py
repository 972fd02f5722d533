"""How far the branches behind a wide layer go on together, and what they launch, for reports.

    wide -> norm -> relu -> wide -> split        is a chain of four operations

A chain begins where siblings read one tensor, or where a tower stacks what it reads, and goes on as
long as what follows runs for all its branches at once. What it launches is counted as it runs: the
rewritten graph, and the same graph with every wide value taken apart, operation by operation.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from conjoin.graph import channelwise
from conjoin.graph.parts import Parts
from conjoin.graph.separation import Separation, all_modules, separable
from conjoin.launches import LaunchCounter
from conjoin.layers.view import View
from conjoin.layers.wide import Wide


@dataclass(frozen=True, slots=True)
class Chain:
    """Branches that go on alike.

    Attributes:
        branches: how many, with those that go on further than this chain.
        operations: what runs for all of them at once, in order, by the names of classes and
            functions; the first is the siblings themselves.
        layers: the qualified names of the layers behind the siblings that are merged in it.
    """

    branches: int
    operations: tuple[str, ...]
    layers: tuple[str, ...] = ()


class Depths:
    """The chains of a model's rewritten graphs, noted and counted as they run.

    Attributes:
        chains: the chains that begin at a wide layer.
        roots: the wide layer at which the chain begins that a wide layer is part of.
        before: the launches of the branches by themselves, but for their layers, by wide layer.
        after: the launches beside the wide layers, likewise.
        noting: whether they are noted and counted now.
    """

    def __init__(self, model: nn.Module) -> None:
        """Of a model, whose names the layers are called by."""
        self.chains: dict[Wide, tuple[Chain, ...]] = {}
        self.roots: dict[Wide, Wide] = {}
        self.before: collections.Counter[Wide] = collections.Counter()
        self.after: collections.Counter[Wide] = collections.Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self.noting = False
        self._apart = False

    def watch(self, graph_module: fx.GraphModule) -> None:
        """Puts a graph in its place that runs the given one, and notes and counts that if asked."""
        function = self._counting(graph_module)
        graph = fx.Graph()
        given = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        inputs = [graph.node_copy(node) for node in given]
        graph.output(graph.call_function(function, tuple(inputs)))
        graph.set_codegen(graph_module.graph._codegen)  # It may take inputs and outputs apart.
        graph_module.graph = graph

    def _counting(self, graph_module: fx.GraphModule) -> Callable[..., Any]:
        graph, modules = graph_module.graph, all_modules(graph_module)
        apart = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        apart.output(apart.graph_copy(graph, copies))
        found = Separation(apart, modules, separable(graph_module, modules))
        found.run()

        def wide_at(node: fx.Node | None) -> Wide | None:
            module = modules.get(str(node.target)) if node is not None else None
            return module if isinstance(module, Wide) else None

        roots = {node: wide_at(found.replaced.get(copies[node])) for node in copies}
        after = {n: root for n, root in roots.items() if root is not None and not wide_at(n)}
        before = {n: root for n, at in found.made.items() if (root := wide_at(at)) is not None}

        def counting(*args: Any) -> Any:
            if not self.noting:
                return fx.Interpreter(graph_module, graph=graph).run(
                    *args, enable_io_processing=False
                )
            if self._apart:  # Within another graph, of which only one run counts what is inside.
                return _Counting(graph_module, graph, {}, self.after).run(
                    *args, enable_io_processing=False
                )
            self._note(found.found, modules)
            self._apart = True
            try:
                _Counting(graph_module, apart, before, self.before).run(
                    *args, enable_io_processing=False
                )
            finally:
                self._apart = False
            return _Counting(graph_module, graph, after, self.after).run(
                *args, enable_io_processing=False
            )

        return counting

    def _note(self, found: Iterable[Parts], modules: Mapping[str, nn.Module]) -> None:
        """Notes the chains that values come from."""
        deepest: dict[fx.Node, dict[int, tuple[fx.Node, ...]]] = {}
        for value in found:
            if value.root is None:
                continue
            paths = deepest.setdefault(value.root, {})
            for branch in value.branches:
                paths[branch] = max(paths.get(branch, ()), value.path, key=len)
        for root, paths in deepest.items():
            wide = modules[str(root.target)]
            if not isinstance(wide, Wide):
                continue
            for path in paths.values():
                reached = [modules[str(node.target)] for node in path if node.op == "call_module"]
                for inner in reached:
                    if isinstance(inner, Wide):
                        self.roots.setdefault(inner, wide)
            if wide not in self.chains:
                self.chains[wide] = tuple(self._chains(paths, modules))

    def _chains(
        self, paths: Mapping[int, tuple[fx.Node, ...]], modules: Mapping[str, nn.Module]
    ) -> Iterable[Chain]:
        """The chains of the branches of one wide layer, but for those that end at once.

        Of branches that part ways later on, all count in the chain that they begin with.
        """
        named: set[str] = set()
        for path in dict.fromkeys(path for path in paths.values() if len(path) > 1):
            layers = [
                self._names[view]
                for node in path[1:]
                for view in _views(modules.get(str(node.target)), node, modules)
            ]
            own = tuple(name for name in layers if name not in named)
            named |= {*own}
            branches = sum(other[: len(path)] == path for other in paths.values())
            yield Chain(branches, tuple(_name(node, modules) for node in path), own)


class _Counting(fx.Interpreter):
    """Runs a graph, and counts what some of its nodes launch."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        graph: fx.Graph,
        counted: Mapping[fx.Node, Wide],
        counts: collections.Counter[Wide],
    ) -> None:
        super().__init__(graph_module, graph=graph)
        self._counted = counted
        self._counts = counts

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        if n not in self._counted:
            return super().run_node(n)
        with LaunchCounter() as counter:
            value = super().run_node(n)
        self._counts[self._counted[n]] += counter.count
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What a module gives; a view by itself."""
        module = self.fetch_attr(target)
        if isinstance(module, View):
            return module.conjoin_base.forward(module, *args, **kwargs)
        return module(*args, **kwargs)


def _views(
    wide: nn.Module | None, call: fx.Node, modules: Mapping[str, nn.Module]
) -> list[nn.Module]:
    """The views of a wide layer, in order."""
    if call.op != "call_module" or not isinstance(wide, Wide):
        return []
    views = {m for m in modules.values() if isinstance(m, View) and m.wide_layer is wide}
    return sorted(views, key=lambda view: view.conjoin_index)  # type: ignore[arg-type, return-value]


def _name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """The name of an operation that users know it by."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return module.kind.name if isinstance(module, Wide) else type(module).__name__
    if node.target is channelwise.softmax_of_parts:
        return "log_softmax" if node.args[2] else "softmax"
    if node.target is channelwise.layer_norm_of_parts:
        return "rms_norm" if node.args[3] else "layer_norm"
    if node.target is channelwise.instance_norm_of_images:
        return "instance_norm"
    return str(getattr(node.target, "__name__", node.target))
