"""Writes a rewritten graph as ATen operations again.

What the passes have left as it was becomes the very node of the program that it stands for, with
its name and all that is known of it. What they have put in is run on the values of what it reads,
and becomes the operations that it consists of; a wide layer reads parameters that are inputs of the
program in the place of its siblings'. A value that takes the place of another has its name.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from conjoin.graph import edit, hazards, strides
from conjoin.graph.meta import VALUE
from conjoin.layers.checks import TENSORS
from conjoin.layers.owner import Owner
from conjoin.layers.product import SUFFIX
from conjoin.layers.view import View, wides
from conjoin.layers.wide import WIDE, Wide
from conjoin.merging import common_path
from conjoin.programs import fakes
from conjoin.programs.raised import Raised, aliases, held, within

CARRIED = ("stack_trace", "nn_module_stack", "custom")
"""What is known of a node that goes for what takes its place too."""


class LoweringError(ValueError):
    """Something that the passes have put in cannot be written as operations of the program.

    Attributes:
        layers: the names of the layers that it is about, as far as they are known.
    """

    def __init__(self, layers: Sequence[str], why: str) -> None:
        super().__init__(why)
        self.layers = frozenset(layers)


@dataclass(frozen=True, slots=True)
class Slice:
    """A parameter or buffer that has become a part of a wide one.

    Attributes:
        wide: the wide layer.
        name: the tensor's name there.
        whole: the qualified name that the wide tensor has.
        index: which part it is.
    """

    wide: Wide
    name: str
    whole: str
    index: int

    @property
    def tensor(self) -> Tensor:
        """The wide tensor."""
        return wide_tensors(self.wide)[self.name]

    @property
    def part(self) -> Tensor:
        """The part: a view of the wide tensor."""
        return self.of(self.tensor.detach())

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor that lies as the wide one does: a view."""
        if self.name in self.wide.kind.counters:
            return tensor[self.index]
        kind = self.name if self.name in TENSORS else "weight"
        return self.wide.part(kind, tensor, self.index)


def wide_tensors(wide: Wide) -> dict[str, Tensor]:
    """The parameters and running buffers of a wide layer."""
    held: dict[str, Tensor | None] = {name: getattr(wide, name) for name in TENSORS}
    return {name: t for name, t in (held | wide.running).items() if t is not None}


def slices(module: nn.Module) -> dict[str, Slice]:
    """What the parameters and buffers that were merged have become, by their names."""
    found: dict[str, Slice] = {}
    for wide, members in wides(module).items():
        leader = next(name for name, view in members if view.conjoin_leads)
        for index, (member, _) in enumerate(members):
            for name in wide_tensors(wide):
                if name not in TENSORS or wide.holds(name, index):
                    whole = within(f"{leader.removesuffix(SUFFIX)}.{WIDE}.{name}")
                    found[within(_held_at(module, member, name))] = Slice(wide, name, whole, index)
    return found


def _held_at(module: nn.Module, layer: str, name: str) -> str:
    """The name of a layer's tensor; for a product that of its owner's Parameter."""
    path, _, key = layer.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, Owner) and key.endswith(SUFFIX):
        places = owner.conjoin_lent.items()
        return next(f"{path}.{own}" for own, place in places if place == (key, name))
    return f"{layer}.{name}"


class Lowering:
    """Lowers one graph.

    Attributes:
        graph: the new graph.
        kept: for each node of the program that is in it the new node.
        wholes: the wide tensors' placeholders by their qualified names.
    """

    def __init__(self, program: ExportedProgram, raised: Raised) -> None:
        """Takes a program, and its raised graph after the passes."""
        mode = fakes.mode_of(program.graph)
        assert mode is not None  # a program with layers has tensors
        self.graph = fx.Graph()
        self.kept: dict[fx.Node, fx.Node] = {}
        self.wholes: dict[str, fx.Node] = {}
        self._mode = mode
        self._decomposed = fakes.is_decomposed(program.graph)
        self._program = program
        self._raised = raised
        self._slices = slices(raised.module)
        self._names = {wide: [n for n, _ in each] for wide, each in wides(raised.module).items()}
        self._values: dict[fx.Node, Any] = {}
        self._taken = {node.name for node in program.graph.nodes}
        self._stand_ins = _stand_ins(raised)
        self._made: set[fx.Node] = set()

    def run(self) -> None:
        """Makes the new graph.

        Raises:
            LoweringError: it cannot be made.
        """
        self._inputs()
        for node in self._raised.module.graph.nodes:
            origins = self._raised.origins.get(node, ())
            slice = self._slices.get(within(str(node.target))) if node.op == "get_attr" else None
            if slice is not None:
                self._values[node] = self._cut(node, slice) if node.users else None
            elif origins and origins[-1] in self.kept:
                self._values[node] = self.kept[origins[-1]]
            elif origins and self._stays(node, origins):
                self._values[node] = self._keep(node, origins)
            else:
                self._values[node] = self._named(node, self._lower(node))
        self.graph.lint()

    def _inputs(self) -> None:
        """The placeholders: the program's, with wide tensors where the first of their parts was."""
        specs, also = held(self._program), aliases(self._program)
        for node in self._program.graph.nodes:
            if node.op != "placeholder":
                continue
            spec = specs.get(node.name)
            name = "" if spec is None else str(spec.target)
            slice = self._slices.get(also.get(name, name))
            if slice is None:
                self.kept[node] = edit.copied(self.graph, node, self.kept.__getitem__)
            elif slice.whole not in self.wholes:
                name = re.sub(r"\W", "_", f"{node.name[:2]}{slice.whole}").lower()
                self.wholes[slice.whole] = made = self.graph.placeholder(self._fresh(name))
                made.meta[VALUE] = fakes.faked(self._mode, slice.tensor)

    def _stays(self, node: fx.Node, origins: Sequence[fx.Node]) -> bool:
        """Whether a node is one of the program's."""
        if not self._raised.is_kept(node):
            return False
        # What they are parts of is written anew, with a copy where the memory needs one.
        contiguous = any(hazards.called(each) in strides.CONTIGUOUS for each in origins)
        now: dict[fx.Node, fx.Node] = {}
        for before, after in self._raised.replaced(node):
            value = self._values.get(after)
            if not isinstance(value, fx.Node) or now.setdefault(before, after) is not after:
                return False
            if contiguous and fakes.layout(value.meta.get(VALUE)) != fakes.layout(
                before.meta.get(VALUE)
            ):
                return False
        return True

    def _keep(self, node: fx.Node, origins: Sequence[fx.Node]) -> fx.Node:
        """The program's nodes, reading what they read now."""
        read = {
            self._raised.origins[before][-1]: self._values[after]
            for before, after in self._raised.replaced(node)
        }
        known = ChainMap(read, self.kept)
        for origin in origins:
            self.kept[origin] = copied = edit.copied(self.graph, origin, known.__getitem__)
            self._look_at(copied, origin)
        return self.kept[origins[-1]]

    def _look_at(self, node: fx.Node, origin: fx.Node) -> None:
        """Computes the value of a node anew that reads what lies in another way than it did."""
        before = [fakes.layout(each.meta.get(VALUE)) for each in origin.all_input_nodes]
        after = [fakes.layout(each.meta.get(VALUE)) for each in node.all_input_nodes]
        if before != after and node.op == "output":
            raise LoweringError(self._behind(node), "an output would lie in memory in another way")
        simple = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if before == after or not simple or "unbacked_bindings" in node.meta:
            return
        try:
            with fakes.nothing_new(self._mode):
                node.meta[VALUE] = fakes.computed(self._mode, node)
        except Exception as error:
            raise LoweringError(self._behind(node), f"{node} would fail: {error}") from error

    def _cut(self, node: fx.Node, slice: Slice) -> Any:
        """A parameter or buffer that was merged, where something else reads it too."""
        reader = next(iter(node.users))  # Which tells where it comes from.
        try:
            return self._written(reader, slice.of, (self.wholes[slice.whole],))
        except Exception as error:
            raise LoweringError(self._names[slice.wide], f"{node.target}: {error}") from error

    def _lower(self, node: fx.Node) -> Any:
        """A node that the passes have put in, as the nodes of its value."""
        if node.target is operator.getitem:
            source: Any = node.args[0]
            whole = self._values[source]
            if not isinstance(whole, fx.Node):
                return whole[node.args[1]]
        function, tensors = self._function(node)
        given = map_arg((node.args, node.kwargs), self._values.__getitem__)
        try:
            return self._written(node, function, (*given, tensors))
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(self._above(node), f"{node.target}: {error}") from error

    def _function(self, node: fx.Node) -> tuple[Callable[..., Any], dict[str, fx.Node]]:
        """What a node does to its arguments and some tensors, and these tensors."""
        if node.op == "call_function":
            target: Any = node.target
            return lambda args, kwargs, _: target(*args, **kwargs), {}
        if node.op == "call_method":
            name = str(node.target)
            return lambda args, kwargs, _: getattr(args[0], name)(*args[1:], **kwargs), {}
        module = self._raised.module.get_submodule(str(node.target))
        if isinstance(module, Wide):
            named = {each.name: each.whole for each in self._slices.values() if each.wide is module}
            # A program without a counter that nothing reads may still have it in its state.
            there = {n: whole for n, whole in named.items() if whole in self.wholes}
            tensors = {name: self.wholes[whole] for name, whole in there.items()}
            bare = copy.copy(module)
            return lambda args, kwargs, held: _with(bare, held)(*args, **kwargs), tensors
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        tensors = {name: self._tensor(within(f"{node.target}.{name}")) for name in names}
        return lambda args, kwargs, held: torch.func.functional_call(
            module, held, args, kwargs
        ), tensors

    def _tensor(self, name: str) -> fx.Node:
        """The placeholder of a parameter or buffer that was not merged."""
        specs = held(self._program)
        return next(
            self.kept[node]
            for node in self._program.graph.nodes
            if node.op == "placeholder" and node.name in specs and specs[node.name].target == name
        )

    def _written(self, node: fx.Node, function: Callable[..., Any], given: Any) -> Any:
        """Puts the operations of a function into the graph, and gives the nodes of its value."""
        leaves, structure = pytree.tree_flatten(given)
        read = [*dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node))]

        def run(*values: Any) -> Any:
            known = dict(zip(read, values, strict=True))
            filled = [known[each] if isinstance(each, fx.Node) else each for each in leaves]
            return function(*pytree.tree_unflatten(filled, structure))

        values = [each.meta[VALUE] for each in read]
        traced = fakes.operations(self._mode, run, values, decomposed=self._decomposed)
        inputs = iter(read)
        at: dict[fx.Node, fx.Node] = {}
        result: Any = None
        for each in traced.graph.nodes:
            if each.op == "placeholder":
                at[each] = next(inputs)
            elif each.op == "output":
                result = map_arg(each.args[0], at.__getitem__)
            elif each.op == "call_function":
                at[each] = self._put(node, each, at)
            else:
                raise LoweringError(self._above(node), f"{each.format_node()} is no operation")
        return result

    def _put(self, node: fx.Node, each: fx.Node, at: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """One operation of what a node consists of."""
        made = self.graph.create_node(
            "call_function",
            each.target,
            map_arg(each.args, at.__getitem__),
            map_arg(each.kwargs, at.__getitem__),
            name=self._fresh(f"wide_{each.name}"),
        )
        known = self._known_of(node)
        made.meta = {**{key: known[key] for key in CARRIED if key in known}, **each.meta}
        self._made.add(made)
        return made

    def _known_of(self, node: fx.Node) -> dict[str, Any]:
        """What is known of a node: for a wide layer, in the module that holds its siblings."""
        known, near = dict(node.meta), node
        while "stack_trace" not in known and near.all_input_nodes:
            near = near.all_input_nodes[0]
            known = {**near.meta, **known}
        near = node
        while "nn_module_stack" not in known and near.users:  # Made of parameters only.
            near = next(iter(near.users))
            known = {**near.meta, **known}
        module = self._raised.module.get_submodule(str(node.target)) if _is_call(node) else None
        stack: dict[str, Any] | None = known.get("nn_module_stack")
        if isinstance(module, Wide) and stack:
            path = within(f"{common_path(self._names[module])}.")
            known["nn_module_stack"] = {
                key: value
                for key, value in stack.items()
                if not value[0] or path.startswith(f"{value[0]}.")
            }
        return known

    def _named(self, node: fx.Node, value: Any) -> Any:
        """A value, under the name of the one that it takes the place of."""
        name = self._stand_ins.get(node)
        if name is not None and value in self._made:
            value.name = name
            self._made.discard(value)
        return value

    def _fresh(self, name: str) -> str:
        """A name that no node of the program has."""
        number, found = 0, name
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found

    def _above(self, node: fx.Node) -> list[str]:
        """The layers of the wide layers next to a node, going up from it."""
        pending, seen = [node], {node}
        for each in pending:
            module = self._raised.module.get_submodule(str(each.target)) if _is_call(each) else None
            if isinstance(module, Wide):
                return self._names[module]
            new = [input for input in each.all_input_nodes if input not in seen]
            seen.update(new)
            pending += new
        return []

    def _behind(self, node: fx.Node) -> list[str]:
        """The layers of the wide layers next to a new node, going up from it."""
        for raised, value in self._values.items():
            if value in node.all_input_nodes and (found := self._above(raised)):
                return found
        return []


def _stand_ins(raised: Raised) -> dict[fx.Node, str]:
    """For nodes that take the place of one that is gone the name of that one in the program."""
    there = {*raised.module.graph.nodes}
    found: dict[fx.Node, str] = {}
    for node in raised.module.graph.nodes:
        if raised.is_kept(node):
            for before, after in raised.replaced(node):
                if before not in there and before is not after:
                    found.setdefault(after, raised.origins[before][-1].name)
    return found


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_module"


def _with(wide: Wide, tensors: Mapping[str, Any]) -> Wide:
    """A wide layer on other tensors."""
    wide._parameters = {}
    for name in TENSORS:
        wide.__dict__[name] = tensors.get(name)
    wide._zeros, wide.constants = None, ()
    wide.running = {name: tensors[name] for name in wide.running if name in tensors}
    wide._lent = wide._cut(wide.running)
    return wide


def called_apart(program: ExportedProgram, raised: Raised) -> Iterator[str]:
    """The layers that were merged and are called one by one, or whose parameters are not theirs.

    They are not where something else reads them that may change them, or under another name.
    """
    modules, merged = edit.called_modules(raised.module), slices(raised.module)
    also = aliases(program)
    tied = {*also, *also.values()}
    for node in raised.module.graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and isinstance(modules[target], View):
            yield target
        read = node.op == "get_attr" and within(target) in merged and node.users
        if read and (within(target) in tied or hazards.is_seen(node, modules)):
            yield target.rpartition(".")[0]
