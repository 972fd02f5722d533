"""Takes the wide tensors of a graph apart, into the tensors of the branches.

    y = wide(x)              becomes        y_i = layer_i(x)
    z = f(y)                 becomes        z_i = f(y_i)
    z = wide(y, apart)       becomes        z_i = layer_i(y_i)
    y = f(batched(x_i))      becomes        y_i = f(x_i)
    r = g(y), g unknown      becomes        r = g(cat(y_1, ..., y_n))

A graph is gone through once, in order. What is known of a wide value is the nodes of its parts and
how they lie in it; no wide value is computed, but where something unknown reads it.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from conjoin.graph import channelwise, edit, elementwise, hazards, samplewise
from conjoin.graph.bundles import CASTS, batched, beside, columns, rejoined
from conjoin.graph.epochs import epochs_of
from conjoin.graph.parts import Parts
from conjoin.graph.twins import twin_of
from conjoin.layers.embedding import unstack
from conjoin.layers.view import wides
from conjoin.layers.wide import Wide

Value = fx.Node | Parts | tuple["fx.Node | Parts", ...]
"""What becomes of a node: another node, parts, or a split's items."""


class Separation:
    """Takes the wide values of one graph apart.

    Attributes:
        found: the parts of every wide value.
        replaced: the nodes of the wide values that are not needed any more, each with its root;
            also what a tower reads its parts from.
        made: the new operations on parts, and joints of them, each with its root.
        failed: the wide layers with a call that is not understood.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        names: Mapping[Wide, Sequence[str]],
    ) -> None:
        """Looks at a graph.

        Args:
            graph: the graph.
            modules: the modules by target.
            names: the wide layers to take apart, and the targets of their views in order.
        """
        self.found: list[Parts] = []
        self.replaced: dict[fx.Node, fx.Node | None] = {}
        self.made: dict[fx.Node, fx.Node] = {}
        self.failed: set[Wide] = set()
        self._graph = graph
        self._modules = modules
        self._names = names
        self._uses = {node: len(node.users) for node in graph.nodes}
        self._epochs = epochs_of(graph, modules).settled()
        self._values: dict[fx.Node, Value] = {}
        self._contiguous: set[fx.Node] = set()

    def run(self) -> None:
        """Changes the graph in place."""
        for node in list(self._graph.nodes):
            with self._graph.inserting_before(node):
                value = self._value(node)
                if value is None:
                    self._read(node)
                else:
                    self._values[node] = value
        for node in reversed(self.replaced):
            if not node.users:
                self._graph.erase_node(node)

    def _value(self, node: fx.Node) -> Value | None:
        """What becomes of a node; None where it stays."""
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Wide):
            return self._layer(node, module)
        if node.target is batched:
            return self._batched(node)
        inputs = node.all_input_nodes
        held = self._values.get(inputs[0]) if len(inputs) == 1 else None
        value: Value | None
        if isinstance(held, tuple):
            value = self._item(node, held)
        elif isinstance(held, fx.Node):
            value = self._unclone(node, held)
        elif held is None:
            return None
        else:
            value = self._cut(node, held)  # Which may be of no items.
            value = self._moved(node, held) if value is None else value
            value = self._each(node, held) if value is None else value
            if value is not None:
                self.replaced[node] = held.root
        return value

    def _layer(self, node: fx.Node, wide: Wide) -> Parts | None:
        """The calls of the layers of a wide layer."""
        names = self._names.get(wide)
        if names is None:
            return None
        inputs, before = self._inputs(node, wide)
        if inputs is None:
            self.failed.add(wide)
            return None
        nodes = tuple(
            self._graph.call_module(name, (input,))
            for name, input in zip(names, inputs, strict=True)
        )
        dim, stacked = _layout(wide, node)
        if not node.kwargs:
            self._contiguous |= {nodes[i] for i in wide.contiguous}
        root = node if before is None or before.root is None else before.root
        self.replaced[node] = root
        sizes: Any = (1,) * len(nodes) if stacked else node.kwargs.get("sizes") or wide.widths
        parts = Parts(
            nodes=nodes,
            dim=dim,
            stacked=stacked,
            sizes=tuple(sizes),
            names=tuple(names),
            root=root,
            branches=tuple(range(len(nodes))) if before is None else before.branches,
            path=(node,) if before is None else (*before.path, node),
        )
        self.found.append(parts)
        return parts

    def _inputs(self, node: fx.Node, wide: Wide) -> tuple[Sequence[fx.Node] | None, Parts | None]:
        """What each layer reads, and the parts that these are, if they are parts."""
        if len(node.args) != 1 or not isinstance(source := node.args[0], fx.Node):
            return None, None
        if not node.kwargs:
            return [self._whole(source)] * len(wide.widths), None
        held = self._values.get(source)
        if isinstance(held, Parts):
            dim, stacked = _layout(wide, node)
            fits = (held.dim, held.stacked) == (dim, stacked) and len(held.nodes) == len(
                wide.widths
            )
            fits &= held.equal or "apart" not in node.kwargs
            return (held.nodes, held) if fits else (None, None)
        return self._gathered(source, node, wide), None

    def _gathered(self, stack: fx.Node, call: fx.Node, wide: Wide) -> Sequence[fx.Node] | None:
        """What was stacked for a wide layer, or put side by side."""
        items = stack.args[0] if stack.args else None
        layout = _layout(wide, call)
        if stack.target is columns and layout == (0, True):
            return self._columns(stack, call, wide)
        if stack.target in CASTS and layout == (0, True) and isinstance(items, fx.Node):
            before = self._gathered(items, call, wide)
            self.replaced.setdefault(stack, call)
            name = str(stack.target)
            return before and [self._graph.call_method(name, (node,)) for node in before]
        if layout == (0, True):
            known = stack.target is torch.stack and stack.args[1:] in ((), (0,))
        else:
            known = stack.target is beside and layout == (-1, False)
        if (
            not known
            or stack.kwargs
            or not isinstance(items, (list, tuple))
            or len(items) != len(wide.widths)
        ):
            return None
        nodes = [item for item in items if isinstance(item, fx.Node)]
        if len(nodes) < len(items) or self._epochs[stack] != self._epochs[call]:
            return None
        self.replaced.setdefault(stack, call)
        return nodes

    def _columns(self, stack: fx.Node, call: fx.Node, wide: Wide) -> Sequence[fx.Node] | None:
        """The columns of a table that a wide layer reads."""
        whole, dim, start, stop = stack.args
        if stop - start != len(wide.widths) or self._epochs[stack] != self._epochs[call]:  # type: ignore[operator]
            return None
        self.replaced.setdefault(stack, call)
        return [
            self._graph.call_method("select", (whole, dim, place))
            for place in range(start, stop)  # type: ignore[arg-type]
        ]

    def _batched(self, node: fx.Node) -> Parts | None:
        """What was stacked for one layer."""
        items: Any = node.args[0]
        if any(self._epochs[user] != self._epochs[node] for user in node.users):
            return None
        self.replaced[node] = None
        return Parts(
            nodes=tuple(self._whole(item) for item in items),
            dim=0,
            stacked=True,
            sizes=(1,) * len(items),
            names=(),
            root=None,
            branches=tuple(range(len(items))),
            path=(),
        )

    def _item(self, node: fx.Node, items: tuple[fx.Node | Parts, ...]) -> fx.Node | Parts:
        """One item of a split."""
        item = items[node.args[1]]  # type: ignore[index]
        self.replaced[node] = None
        if isinstance(item, fx.Node):
            item.meta.update(node.meta)
        return item

    def _unclone(self, node: fx.Node, part: fx.Node) -> fx.Node | None:
        """A layer's own output, where a contiguous copy of its part was handed out."""
        copied = node.target == "clone" and node.kwargs == {
            "memory_format": torch.contiguous_format
        }
        if not copied or part not in self._contiguous:
            return None
        self._contiguous.discard(part)
        roots = [parts.root for parts in self.found if part in parts.nodes]
        self.replaced[node] = roots[0]
        return part

    def _cut(self, node: fx.Node, held: Parts) -> tuple[fx.Node | Parts, ...] | None:
        """The items of a split."""
        if self._uses[node.all_input_nodes[0]] != 1 or not all(map(_is_item, node.users)):
            return None
        if node.target is unstack:
            return held.nodes if (held.dim, held.stacked) == (0, True) else None
        if node.target is not torch.unsafe_split_with_sizes or len(node.args) != 3:
            return None
        sizes: Any = node.args[1]
        return held.cut(sizes) if node.args[2] == held.dim else None

    def _moved(self, node: fx.Node, held: Parts) -> Parts | fx.Node | None:
        """The same parts, lying in another way; or joined, where the rank decides how they lie."""
        if node.target is rejoined:
            sizes: Any
            sizes, along, dim = node.args[1:]
            same = (held.dim, held.stacked) == (along, False) and held.sizes == tuple(sizes)
            if not same or along == dim:
                return held if same else None
            return self._joint(torch.cat, held, dim)
        if node.op != "call_method" or node.kwargs or self._uses[node.all_input_nodes[0]] != 1:
            return None
        given = node.args[1:]
        if node.target == "movedim" and held.stacked and given[:1] == (held.dim,):
            to = given[1] if len(given) == 2 else None
            return dataclasses.replace(held, dim=to) if isinstance(to, int) else None
        if node.target == "flatten" and held.stacked and (held.dim, given) == (-2, (-2,)):
            return dataclasses.replace(held, dim=-1, stacked=False, sizes=None)
        if node.target == "flatten" and held.stacked and given == (held.dim, held.dim + 1):
            # How they lie is told from the end, and here the rank decides that.
            return self._joint(torch.cat, held, held.dim if held.dim >= 0 else held.dim + 1)
        if node.target == "unflatten" and not held.stacked and held.equal:
            shape = tuple(given[1]) if isinstance(given[1], (list, tuple)) else ()
            if (given[0], shape) == (held.dim, (len(held.nodes), -1)):
                ones = (1,) * len(held.nodes)
                return dataclasses.replace(held, dim=held.dim - 1, stacked=True, sizes=ones)
        return None

    def _each(self, node: fx.Node, held: Parts) -> Parts | None:
        """An operation on each part, where it acts on each part by itself."""
        source = node.all_input_nodes[0]
        if self._uses[source] > 1 and hazards.shares_memory(node, self._modules):
            return None  # What is done to one of them is done to the other.
        nodes = self._operations(node, source, held)
        if nodes is None:
            return None
        if held.root is not None:
            self.made.update(dict.fromkeys(nodes, held.root))
        parts = dataclasses.replace(held, nodes=nodes, path=(*held.path, node))
        self.found.append(parts)
        return parts

    def _operations(
        self, node: fx.Node, source: fx.Node, held: Parts
    ) -> tuple[fx.Node, ...] | None:
        """What does on each part what a node does on all of `source`; None where nothing does."""
        dim = None if held.stacked else held.dim
        if node.target in (channelwise.softmax_of_parts, channelwise.layer_norm_of_parts):
            return self._of_parts(node, held, dim)
        if samplewise.key(node, source, self._modules) is not None:
            return self._copies(node, held) if held.stacked else None
        if (
            elementwise.key(node, source, self._modules) is None
            and channelwise.key(node, source, dim, self._modules) is None
        ):
            return None
        nodes = self._copies(node, held)
        if node.op == "call_module":
            for index, made in enumerate(nodes):
                made.target = twin_of(str(node.target), held.names, index, self._modules)
        return nodes

    def _of_parts(self, node: fx.Node, held: Parts, dim: int | None) -> tuple[fx.Node, ...] | None:
        """A softmax or a normalization of each part, for the call that does all of them."""
        *given, count, along = node.args[1:]
        if (along, count) != (dim, len(held.nodes)) or (held.stacked and held.dim != 0):
            return None
        function: Callable[..., Any]
        settings: dict[str, Any]
        if node.target is channelwise.softmax_of_parts:
            over, logarithmic = given
            function, settings = torch.log_softmax if logarithmic else torch.softmax, {}
        else:
            over, eps, root_only = given
            function, settings = F.rms_norm if root_only else F.layer_norm, {"eps": eps}
        call = self._graph.call_function
        return tuple(call(function, (part, over), settings) for part in held.nodes)

    def _copies(self, node: fx.Node, held: Parts) -> tuple[fx.Node, ...]:
        """The operation of a node, on each part."""
        given = node.all_input_nodes[0]
        maps = [{given: part} for part in held.nodes]
        return tuple(self._graph.node_copy(node, of.__getitem__) for of in maps)

    def _read(self, node: fx.Node) -> None:
        """Gives a node that stays what it reads."""
        inputs = [input for input in node.all_input_nodes if input in self._values]
        if inputs:
            made = {input: self._whole(input) for input in inputs}
            node.args = map_arg(node.args, lambda input: made.get(input, input))
            node.kwargs = map_arg(node.kwargs, lambda input: made.get(input, input))

    def _whole(self, node: fx.Node) -> fx.Node:
        """A value as one tensor; from then on it is that, since somebody may change it."""
        value = self._values.get(node, node)
        if isinstance(value, Parts):
            function = torch.stack if value.stacked else torch.cat
            with self._graph.inserting_before(node):  # Where its reader stands, no_grad may hold.
                value = self._values[node] = self._joint(function, value, value.dim)
        assert isinstance(value, fx.Node)  # all that reads a split is its items
        return value

    def _joint(self, function: Callable[..., Any], parts: Parts, dim: Any) -> fx.Node:
        """Parts joined, at the graph's insert point."""
        joint = self._graph.call_function(function, (list(parts.nodes), dim))
        if parts.root is not None:
            self.made[joint] = parts.root
        return joint


def all_modules(graph_module: fx.GraphModule) -> dict[str, nn.Module]:
    """All modules that a graph calls or could call, by target."""
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    return modules | edit.called_modules(graph_module)


def separable(
    graph_module: fx.GraphModule, modules: Mapping[str, nn.Module]
) -> dict[Wide, list[str]]:
    """The wide layers that can be taken apart, and the targets of their views in order.

    All the views stand in the graph's module, and every call of the wide layer is understood; that
    is tried on copies of the graph.
    """
    names = {
        wide: [name for name, _ in members]
        for wide, members in wides(graph_module).items()
        if [view.conjoin_index for _, view in members] == [*range(len(wide.widths))]
    }
    while names:
        trial = Separation(copy.deepcopy(graph_module.graph), modules, names)
        trial.run()
        if not trial.failed:
            break
        names = {wide: found for wide, found in names.items() if wide not in trial.failed}
    return names


def _layout(wide: Wide, call: fx.Node) -> tuple[int, bool]:
    """How the parts lie in what a wide layer gives: along which dimension, and whether stacked."""
    dim = call.kwargs.get("dim")
    if isinstance(dim, int):
        return dim, False
    stacked = wide.kind.stacked if "apart" in call.kwargs else wide.kind.split(wide)[0] is unstack
    return (0, True) if stacked else (wide.kind.output_dim, False)


def _is_item(user: fx.Node) -> bool:
    return user.target is operator.getitem and isinstance(user.args[1], int)
