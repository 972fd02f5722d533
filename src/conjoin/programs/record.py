"""The record that an optimized program keeps of the original, and the original made from it.

The record is a dictionary of plain values in the graph's own `meta["custom"]`, which
`torch.export.save` writes too. It holds what is not in the optimized program: the nodes that were
taken out, what those that stayed have read, and which part of a wide tensor each parameter is. So
the way back is exact, as long as nobody has changed the optimized graph.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.node import map_arg

from conjoin.graph import edit
from conjoin.graph.meta import VALUE
from conjoin.programs import fakes
from conjoin.programs.lowering import Slice
from conjoin.programs.raised import aliases, held

RECORD = "conjoin"
"""The entry of the graph's custom metadata that holds the record."""

KNOWN = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom")
"""What the record keeps of what is known of a node."""

TYPES = (torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of arguments beside numbers and texts."""


_PATH = re.compile(r"[\w.:#+/ -]+")


class UnrecordableError(ValueError):
    """Something that was taken out of a graph cannot be written down."""


def written(
    program: ExportedProgram,
    graph: fx.Graph,
    kept: Mapping[fx.Node, fx.Node],
    merged: Mapping[str, Slice],
) -> dict[str, Any]:
    """The record of a program, for the optimized one.

    Args:
        program: the program.
        graph: the optimized graph.
        kept: the nodes of the program that are in it too, and what they are there.
        merged: what its parameters and buffers that are gone have become, by their names.

    Raises:
        UnrecordableError: something that was taken out cannot be written down.
    """
    specs = held(program)
    nodes: list[Any] = []
    inputs: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node not in kept:
            nodes.append(_node(node, specs.get(node.name)))
            continue
        nodes.append(name_of(node))
        names = _inputs(node)
        if names != _inputs(kept[node]):
            inputs[name_of(node)] = names
    parts = {name: (slice.whole, _place(slice.part)) for name, slice in merged.items()}
    record = {
        "nodes": nodes,
        "inputs": inputs,
        "tensors": {name: [whole, *place] for name, (whole, place) in parts.items()},
        "strides": {slice.whole: list(slice.tensor.stride()) for slice in merged.values()},
        "order": list(program.state_dict),
        "also": {alias: name for alias, name in aliases(program).items() if name in merged},
        "graph": digest(graph),
    }
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]


def digest(graph: fx.Graph) -> str:
    """A short text that differs between graphs that differ."""
    # A file does not hold what a placeholder is called beside its name, nor where parts are read,
    # and it holds all that an operation gives, read or not.
    lines = [
        (name_of(n), n.op, "" if n.op == "placeholder" else str(n.target), _inputs(n))
        for n in graph.nodes
        if n.op != "get_attr" and (n.users or n.target is not operator.getitem)
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _inputs(node: fx.Node) -> list[str]:
    names: list[str] = []
    map_arg((node.args, node.kwargs), lambda each: names.append(name_of(each)))
    return names


def name_of(node: fx.Node) -> str:
    """The name of a node that it has in a file, too; of a part of the graph where it is kept."""
    return f".{node.target}" if node.op == "get_attr" else node.name


def _place(tensor: Tensor) -> tuple[list[int], list[int], int]:
    return list(tensor.shape), list(tensor.stride()), int(tensor.storage_offset())


def _node(node: fx.Node, spec: InputSpec | None) -> dict[str, Any]:
    """A node that was taken out."""
    known = {key: node.meta[key] for key in KNOWN if key in node.meta}
    meta = json.loads(json.dumps(known, default=_qualified_name))
    if node.op == "placeholder":
        assert spec is not None  # no other inputs are taken out
        return {
            "name": node.name,
            "kind": spec.kind.name,
            "target": spec.target,
            "persistent": spec.persistent,
            "parameter": isinstance(node.meta.get(VALUE), nn.Parameter),
            "meta": meta,
        }
    return {
        "name": node.name,
        "target": _target(node),
        "args": _encoded(node.args),
        "kwargs": _encoded(node.kwargs),
        "meta": meta,
    }


def _qualified_name(value: Any) -> str:
    name = value.__qualname__ if isinstance(value, type) else value.__name__
    return f"{value.__module__}.{name}"


def _target(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        raise UnrecordableError(f"{node.format_node()} is not one of PyTorch's operations")
    return str(node.target)


def _encoded(value: Any) -> Any:
    """An argument as plain values; what JSON does not know as a dictionary that says what it is."""
    if isinstance(value, fx.Node):
        return {"node": name_of(value)}
    if isinstance(value, dict):
        return {"dict": {key: _encoded(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item) for item in value]}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, TYPES):
        return {"torch": str(value).removeprefix("torch.")}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UnrecordableError(f"the argument {value!r} is none that can be written down")


def _decoded(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return nodes[held]
    if kind == "dict":
        return {key: _decoded(item, nodes) for key, item in held.items()}
    if kind == "tuple":
        return tuple(_decoded(item, nodes) for item in held)
    if kind == "device":
        return torch.device(held)
    found = getattr(torch, held)
    if kind != "torch" or not isinstance(found, TYPES):
        raise TypeError(f"{held} is no type of PyTorch's")
    return found


def _operation(name: str) -> Any:
    """The operation of a name such as `aten.linear.default`."""
    if name == "getitem":
        return operator.getitem
    found: Any = torch.ops
    for part in re.fullmatch(r"(\w+)\.(\w+)\.(\w+)", name).groups():  # type: ignore[union-attr]
        found = getattr(found, part)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{name} is no operation of PyTorch's")
    return found


def _check(record: Mapping[str, Any]) -> None:
    """Looks at what becomes part of generated source: a record may come from anybody's file.

    Raises:
        ValueError: it is no name.
    """
    nodes = [node for node in record["nodes"] if not isinstance(node, str)]
    names = [node["name"] for node in nodes]
    names += [name for node in nodes for name in node.get("kwargs", {}).get("dict", {})]
    for name in names:
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} is no name")
    for name in (*record["tensors"], *record["order"]):
        if _PATH.fullmatch(name) is None:
            raise ValueError(f"{name!r} is no name of a tensor")


class Restoration:
    """The program that a record is of, made again.

    Attributes:
        graph: its graph.
        specs: its inputs.
        tensors: the parameters and buffers that were merged, with the values of now.
    """

    def __init__(self, program: ExportedProgram, record: Mapping[str, Any]) -> None:
        """Reads a record.

        Args:
            program: the optimized program.
            record: its record.
        """
        _check(record)
        mode = fakes.mode_of(program.graph)
        assert mode is not None  # a program that was optimized has tensors
        self.graph = fx.Graph()
        self.specs: list[InputSpec] = []
        self.tensors: dict[str, Tensor] = {}
        self._mode = mode
        self._also = record["also"]
        self._there = {name_of(node): node for node in program.graph.nodes}
        names = [str(getattr(spec.arg, "name", "")) for spec in program.graph_signature.input_specs]
        self._specs = dict(zip(names, program.graph_signature.input_specs, strict=True))
        self._nodes: dict[str, fx.Node] = {}
        for name, part in originals(record, program.state_dict).items():
            whole = program.state_dict[record["tensors"][name][0]]
            trains = isinstance(whole, nn.Parameter)
            part = part.clone()
            self.tensors[name] = nn.Parameter(part, whole.requires_grad) if trains else part
        for node in record["nodes"]:
            if isinstance(node, str):
                self._keep(node, record["inputs"].get(node))
            elif "kind" in node:
                self._input(node)
            else:
                self._restore(node)
        self.graph.lint()

    def _keep(self, name: str, inputs: list[str] | None) -> None:
        node = self._there[name]
        if node.op == "get_attr" and name in self._nodes:
            return
        names = iter(_inputs(node) if inputs is None else inputs)
        self._nodes[name] = edit.copied(self.graph, node, lambda _: self._nodes[next(names)])
        if node.op == "placeholder":
            self.specs.append(self._specs[name])

    def _input(self, node: Mapping[str, Any]) -> None:
        name, target = node["name"], node["target"]
        made = self._nodes[name] = self.graph.placeholder(name)
        made.meta = _known(node["meta"])
        value = fakes.faked(self._mode, self.tensors[self._also.get(target, target)])
        is_parameter = node.get("parameter")  # As `strict=True` has it.
        made.meta[VALUE] = nn.Parameter(value, value.requires_grad) if is_parameter else value
        kind = InputKind[node["kind"]]
        spec = InputSpec(kind, TensorArgument(name), target, node["persistent"])
        self.specs.append(spec)

    def _restore(self, node: Mapping[str, Any]) -> None:
        args, kwargs = (_decoded(node[key], self._nodes) for key in ("args", "kwargs"))
        target = _operation(node["target"])
        made = self.graph.call_function(target, args, kwargs)
        made.name = node["name"]
        made.meta = _known(node["meta"])
        made.meta[VALUE] = fakes.computed(self._mode, made)
        self._nodes[node["name"]] = made


def _known(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What was known of a node: where JSON has made lists of tuples, tuples again."""
    known = {key: meta[key] for key in KNOWN if key in meta}
    if "torch_fn" in known:
        known["torch_fn"] = tuple(known["torch_fn"])
    if "nn_module_stack" in known:
        known["nn_module_stack"] = {k: tuple(v) for k, v in known["nn_module_stack"].items()}
    if "source_fn_stack" in known:
        known["source_fn_stack"] = [(k, _source(name)) for k, name in known["source_fn_stack"]]
    return known


def _source(name: str) -> Any:
    """The class or function of a name, as `torch.export.load` finds it; the name where none is."""
    module, _, path = name.partition(".")
    found: Any = {"torch": torch, "_operator": operator}.get(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part, None)
    return name if found is None else found


def originals(record: Mapping[str, Any], held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of wide tensors by the names that they had.

    Args:
        record: the record of a program.
        held: tensors by their names; of wide ones that are not there, there are no parts.
    """
    strides = record["strides"]
    wholes = {name: _laid_out(held[name], strides[name]) for name in strides if name in held}
    return {
        name: wholes[whole].as_strided(size, stride, offset)
        for name, (whole, size, stride, offset) in record["tensors"].items()
        if whole in wholes
    }


def _laid_out(tensor: Tensor, strides: list[int]) -> Tensor:
    """A tensor with these strides, from the beginning of its memory."""
    tensor = tensor.detach()
    if list(tensor.stride()) == strides and tensor.storage_offset() == 0:
        return tensor
    made = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
