"""Raises a program's graph: its operations become calls of layers at their names.

    placeholder p_a_weight, a parameter        becomes    get_attr program.a.weight
    aten.linear(x, p_a_weight, p_a_bias)       becomes    call_module program.a(x)

The program stays as it is. It is remembered which of its nodes each node of the raised graph stands
for, and how that node was written, so that what no pass has touched can be lowered to the very
nodes that it was.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx.node import map_arg

from conjoin.graph.meta import VALUE
from conjoin.graph.rewriting import Draft
from conjoin.layers.owner import Held
from conjoin.tracing.exported import raise_

aten = torch.ops.aten

ROOT = "program"
"""Where in the raised graph's module the program's modules are."""

HELD = (InputKind.PARAMETER, InputKind.BUFFER)
"""The inputs of a program that are tensors of its modules."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a node is written.

    Attributes:
        inputs: the nodes that it reads, in order, each as often as it is written.
        rest: everything else, as text.
    """

    inputs: tuple[fx.Node, ...]
    rest: str


@dataclass(frozen=True, slots=True)
class Raised:
    """A raised graph.

    Attributes:
        module: the graph, with the layers that it calls.
        origins: for each of its nodes the program's nodes that it stands for, the one that gives
            its value last.
        forms: how each of them was written before any pass.
    """

    module: fx.GraphModule
    origins: Mapping[fx.Node, tuple[fx.Node, ...]]
    forms: Mapping[fx.Node, Spelling]

    def is_kept(self, node: fx.Node) -> bool:
        """Whether a node does what it did, though it may read other nodes."""
        known = self.forms.get(node)
        return known is not None and known.rest == form(node).rest

    def replaced(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What a kept node read, and what it reads now in its place."""
        yield from zip(self.forms[node].inputs, form(node).inputs, strict=True)


def form(node: fx.Node) -> Spelling:
    """How a node is written now."""
    inputs: list[fx.Node] = []
    rest = map_arg((node.args, node.kwargs), lambda each: inputs.append(each))
    return Spelling(tuple(inputs), f"{node.op} {node.target} {rest!r}")


def raised(program: ExportedProgram) -> Raised:
    """Raises the graph of a program, which stays as it is."""
    module = Draft(nn.Module(), fx.Graph())
    module.add_module(ROOT, Held())
    for name, tensor in tensors(program).items():
        _hold(module, f"{ROOT}.{name}", tensor)
    specs, also = held(program), aliases(program)
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in specs:
            if specs[node.name].target in also:
                continue
            at[node] = graph.create_node("get_attr", f"{ROOT}.{specs[node.name].target}")
            at[node].meta = dict(node.meta)
        else:
            at[node] = graph.node_copy(node, at.__getitem__)
        if node.op == "get_attr":
            setattr(module, str(node.target), getattr(program.graph_module, str(node.target)))
    module.graph = graph
    origins: dict[fx.Node, tuple[fx.Node, ...]] = {copy: (node,) for node, copy in at.items()}
    for made, gone in raise_(module).items():
        origins[made] = tuple(each for copy in gone for each in origins.pop(copy))
    return Raised(module, origins, {node: form(node) for node in module.graph.nodes})


def look_through(raised: Raised) -> None:
    """Takes out casts to the type that a tensor has, which give the very tensor.

    What they are written for is another type that the model might have had; it has this one now.
    """
    graph = raised.module.graph
    for node in list(graph.nodes):
        if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
            continue
        cast, dtype = node.args
        idle = isinstance(cast, fx.Node) and getattr(cast.meta.get(VALUE), "dtype", None) is dtype
        if idle and all(user.op != "output" for user in node.users):
            node.replace_all_uses_with(cast)
            graph.erase_node(node)


def within(name: str) -> str:
    """The name in the program of what has this one in the raised graph's module."""
    return name.removeprefix(f"{ROOT}.")


def held(program: ExportedProgram) -> dict[str, InputSpec]:
    """The inputs of a program that are tensors of its modules, by the placeholder's name."""
    specs = program.graph_signature.input_specs
    return {str(getattr(spec.arg, "name", "")): spec for spec in specs if spec.kind in HELD}


def tensors(program: ExportedProgram) -> dict[str, Tensor]:
    """The parameters and buffers of a program by their names, without the `aliases` of others."""
    every, specs = _every(program), held(program)
    placeholders = [node for node in program.graph.nodes if node.name in specs and node.users]
    read = {str(specs[node.name].target) for node in placeholders}
    found = {name: tensor for name, tensor in every.items() if name in read}
    known = {*map(_place, found.values())}
    for name, tensor in every.items():
        if name not in found and _place(tensor) not in known:
            found[name] = tensor
            known.add(_place(tensor))
    return found


def aliases(program: ExportedProgram) -> dict[str, str]:
    """Names that are not read of tensors that have another one, and that one."""
    known = tensors(program)
    names = {_place(tensor): name for name, tensor in known.items()}
    every = _every(program).items()
    return {name: names[_place(tensor)] for name, tensor in every if name not in known}


def _every(program: ExportedProgram) -> dict[str, Tensor]:
    """All parameters and buffers by their names; those saved with the constants too."""
    buffers = [str(spec.target) for spec in held(program).values()]
    constants = {name: program.constants[name] for name in buffers if name in program.constants}
    return {**program.state_dict, **constants}


def _place(tensor: Tensor) -> Hashable:
    """What is equal for tensors that are the very same memory, seen in the same way."""
    if not isinstance(tensor, Tensor) or tensor.numel() == 0 or tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _hold(module: nn.Module, name: str, tensor: Any) -> None:
    *path, last = name.split(".")
    for step in path:
        if step not in module._modules:
            module.add_module(step, Held())
        child = module._modules[step]
        assert child is not None  # it was put there
        module = child
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    elif isinstance(tensor, torch.Tensor):
        module.register_buffer(last, tensor)
