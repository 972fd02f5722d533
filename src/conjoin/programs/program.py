"""`optimize` and `unfuse` for exported programs.

The program's graph is raised (`raised.py`), rewritten by the passes like any other, and what they
have changed is lowered again (`lowering.py`). What cannot be lowered for all sizes that the program
is for, is left apart.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)

from conjoin.foreign import unremarked
from conjoin.graph import edit
from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.graph.meta import VALUE
from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Shapes, Sightings
from conjoin.layers import KINDS, Kind, kind_of
from conjoin.layers.kind import elements, hint
from conjoin.layers.view import wides
from conjoin.legality import Reason, Refusal
from conjoin.merging import MERGER, Merger
from conjoin.passes import COMPILED, rewrite_traced, run_all
from conjoin.policy.levels import LevelPolicy
from conjoin.programs import borders, fakes, record
from conjoin.programs.lowering import Lowering, LoweringError, Slice, called_apart, slices
from conjoin.programs.raised import HELD, ROOT, Raised, aliases, held, look_through, raised
from conjoin.programs.record import RECORD, Restoration, UnrecordableError
from conjoin.tracing.exported import raise_

Value = TypeVar("Value")

CUSTOM = "custom"
"""The entry of a graph module's `meta` that `torch.export.save` writes."""


def optimize(program: ExportedProgram, kinds: tuple[Kind, ...] = KINDS) -> ExportedProgram:
    """Merges sibling layers of a program; the program stays as it is.

    Args:
        program: the program.
        kinds: the kinds of layer to merge.

    Returns:
        The program with wide parameters, which has tensors of its own.
    """
    if is_current(program):
        program = unfuse(program)
    apart = {f"{ROOT}.{name}".rpartition(".")[0] for name in _changed(program)}
    # What is a product with a slice at a border would be computed on one side of it.
    batches, rejoins = True, not borders.preserved(program)
    while True:
        found = raised(program)
        look_through(found)
        inputs = _inputs(found.module.graph) if batches else None
        found.module.meta[INPUTS] = inputs
        seen, levels = _varying(found, kinds), LevelPolicy(found.module, Sightings((), {}))
        left_alone = [_refused(apart)]
        found.module.meta[MERGER] = Merger(
            found.module, kinds, seen, left_alone, level_policy=levels
        )
        rejoined = rejoins and _rejoin(found)
        if not rewrite_traced(found.module) and not rejoined:
            return _copied(program)
        why = "layers that were merged are also called one by one, or from several modules"
        groups = [[name for name, _ in members] for members in wides(found.module).values()]
        left = {*called_apart(program, found), *borders.across(program, groups)}
        if inputs is not None and inputs.most is not None and _elements(found) > inputs.most:
            batches = False
            continue
        if not left:
            try:
                return _lowered(program, found)
            except (LoweringError, UnrecordableError) as error:
                left, why = {*getattr(error, "layers", ())}, str(error)
        if left <= apart and not batches and not rejoined:
            warnings.warn(f"the exported program stays as it is: {why}", stacklevel=3)
            return _copied(program)
        if left <= apart:  # No layer is named that it was due to.
            batches = rejoins = False
        apart |= left


def unfuse(program: ExportedProgram) -> ExportedProgram:
    """Gives the program back that was optimized, with the values that the parameters have now.

    Args:
        program: an optimized program, or any other, which stays as it is.

    Returns:
        The program, which has tensors of its own.

    Raises:
        ValueError: the graph has been changed since it was optimized.
    """
    held_back = record_of(program)
    if held_back is None:
        return _copied(program)
    if not is_current(program):
        raise ValueError(
            "the exported program was optimized and its graph has been changed since, so that what "
            "it was made of does not fit it any more: unfuse it before other passes, such as "
            "run_decompositions, change it."
        )
    try:
        restored = Restoration(program, held_back)
        held_now = {**program.state_dict, **restored.tensors}
        state = {name: held_now[held_back["also"].get(name, name)] for name in held_back["order"]}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"what the exported program was made of is not noted in it as it should be ({error}): "
            "export the model that it came from again."
        ) from error
    custom = {k: v for k, v in program.graph_module.meta[CUSTOM].items() if k != RECORD}
    return _built(program, restored.graph, restored.specs, state, custom)


def _rejoin(found: Raised) -> bool:
    """Makes layers of products with slices of one tensor, as an optimized model's views run."""
    if not run_all(found.module, COMPILED):
        return False
    raise_(found.module)
    return True


def _lowered(program: ExportedProgram, found: Raised) -> ExportedProgram:
    """The program of a rewritten graph."""
    lowering = Lowering(program, found)
    lowering.run()
    if lost := borders.missing(program, lowering.graph):
        names = (name for members in wides(found.module).values() for name, _ in members)
        raise LoweringError([*names], f"what {lost[0]} reads or gives is a part of a wide tensor")
    merged, also = slices(found.module), aliases(program)
    state: dict[str, Any] = {}
    for name, tensor in program.state_dict.items():
        slice = merged.get(also.get(name, name))
        state[name if slice is None else slice.whole] = tensor if slice is None else slice.tensor
    made = record.written(program, lowering.graph, lowering.kept, merged)
    custom = {**program.graph_module.meta.get(CUSTOM, {}), RECORD: made}
    specs = [*_specs(program, merged, lowering.wholes)]
    return _built(program, lowering.graph, specs, state, custom)


def _specs(
    program: ExportedProgram, merged: Mapping[str, Slice], wholes: Mapping[str, fx.Node]
) -> Iterator[InputSpec]:
    """The inputs, with wide tensors where the first of their parts was."""
    seen: set[str] = set()
    also = aliases(program)
    for spec in program.graph_signature.input_specs:
        name = str(spec.target)
        slice = merged.get(also.get(name, name)) if spec.kind in HELD else None
        if slice is None:
            yield spec
        elif slice.whole not in seen:
            seen.add(slice.whole)
            argument = TensorArgument(wholes[slice.whole].name)
            yield dataclasses.replace(spec, arg=argument, target=slice.whole)


def _copied(program: ExportedProgram) -> ExportedProgram:
    """The same program with tensors of its own."""
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        at[node] = edit.copied(graph, node, at.__getitem__)
    specs = program.graph_signature.input_specs
    custom = program.graph_module.meta.get(CUSTOM, {})
    return _built(program, graph, specs, program.state_dict, custom)


def _built(
    program: ExportedProgram,
    graph: fx.Graph,
    specs: Sequence[InputSpec],
    state: Mapping[str, Any],
    custom: Mapping[str, Any],
) -> ExportedProgram:
    """A program like another one, of another graph; the tensors are copied."""
    signature = program.graph_signature
    outputs = zip(signature.output_specs, graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
    root = fx.GraphModule(program.graph_module, graph)
    root.meta = {key: value for key, value in program.graph_module.meta.items() if key != CUSTOM}
    if custom:
        root.meta[CUSTOM] = dict(custom)
    state, constants = _tensors_of_its_own(state, program.constants)
    made = ExportedProgram(
        root=root,
        graph=graph,
        graph_signature=ExportGraphSignature(
            [dataclasses.replace(spec) for spec in specs],
            [_output(spec, value) for spec, value in outputs],
        ),
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=duplicate(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )
    # What inputs must be beside the ranges; of a program from a file, nothing else tells.
    made._guards_code = [*program._guards_code]
    return made


def _tensors_of_its_own(
    state: Mapping[str, Any], constants: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Copies, of which those are tied or share memory whose originals do."""
    held = {id(t): t for t in (*state.values(), *constants.values()) if isinstance(t, Tensor)}
    strided = [tensor for tensor in held.values() if tensor.layout is torch.strided]
    users = Counter(tensor.untyped_storage()._cdata for tensor in strided)
    known: dict[int, Any] = {}
    for tensor in strided:
        # As in a file's program, where one Parameter became several on the same memory.
        if type(tensor) is nn.Parameter and users[tensor.untyped_storage()._cdata] > 1:
            values = copy.deepcopy(tensor.data, known)
            known[id(tensor)] = nn.Parameter(values, tensor.requires_grad)
    with unremarked():
        return copy.deepcopy((dict(state), dict(constants)), known)


def _output(spec: OutputSpec, value: object) -> OutputSpec:
    """An output under the name that it has in another graph."""
    if not isinstance(value, fx.Node) or not hasattr(spec.arg, "name"):
        return dataclasses.replace(spec)
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=value.name))


def record_of(program: ExportedProgram) -> dict[str, Any] | None:
    """The record of an optimized program; None of any other."""
    found = program.graph_module.meta.get(CUSTOM, {}).get(RECORD)
    return found if isinstance(found, dict) else None


def is_current(program: ExportedProgram) -> bool:
    """Whether a program was optimized, and has not been changed since."""
    found = record_of(program)
    return found is not None and found.get("graph") == record.digest(program.graph)


def merged_layers(program: ExportedProgram) -> list[set[str]]:
    """The names of layers, or of the weights of products, for each wide layer of a program."""
    found: dict[str, set[str]] = {}
    for name, (whole, *_) in (record_of(program) or {"tensors": {}})["tensors"].items():
        if whole.endswith(".weight"):
            found.setdefault(whole, set()).add(name.removesuffix(".weight"))
    return [*found.values()]


def _changed(program: ExportedProgram) -> Iterator[str]:
    """The parameters and buffers whose new values are outputs, or that are saved nowhere."""
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT and output.target is not None:
            yield output.target
    for spec in held(program).values():
        if spec.target not in program.state_dict:
            yield str(spec.target)


def duplicate(value: Value) -> Value:
    """A deep copy, without what PyTorch remarks on its own tree specifications."""
    with unremarked():
        return copy.deepcopy(value)


def _refused(layers: Iterable[str]) -> Candidate:
    """Layers that are left apart."""
    names = tuple(sorted(layers))
    reason = Reason.IN_PROGRAM
    return Candidate(KINDS[0], names, (0,) * len(names), Refusal(names, reason, ""))


def _inputs(graph: fx.Graph) -> Inputs:
    """What is known of a graph's inputs: which are of one shape."""
    numbers: dict[Hashable, int] = {}
    given = [node for node in graph.nodes if node.op == "placeholder"]
    keys = [
        fakes.layout(node.meta.get(VALUE)) if isinstance(node.meta.get(VALUE), Tensor) else node
        for node in given
    ]
    return Inputs(tuple(numbers.setdefault(key, len(numbers)) for key in keys))


def _varying(found: Raised, kinds: tuple[Kind, ...]) -> Sightings:
    """What layers read and gave in the example whose wide layer pays for small inputs only.

    All others are merged without asking for sizes, as many of which a program may leave open.
    """
    modules = edit.called_modules(found.module)
    shapes: dict[str, Shapes] = {}
    for node in found.module.graph.nodes:
        layer = modules[str(node.target)] if node.op == "call_module" else None
        kind = None if layer is None else kind_of(layer, kinds)
        if kind is None or getattr(layer, "groups", 1) == 1:
            continue
        read, gave = node.args[0].meta.get(VALUE), node.meta.get(VALUE)
        if isinstance(read, Tensor) and isinstance(gave, Tensor):
            input, output = (tuple(map(hint, each.shape)) for each in (read, gave))
            if all((*input, *output)):  # Otherwise nothing tells how large they were.
                shapes[str(node.target)] = Shapes(input, output, read.dtype, read.requires_grad)
    return Sightings((), {}, shapes=shapes)


def _elements(found: Raised) -> int:
    """How many elements the inputs have, for the sizes of the example inputs."""
    inputs = (n.meta.get(VALUE) for n in found.module.graph.nodes if n.op == "placeholder")
    return sum(elements(value) for value in inputs if isinstance(value, Tensor))
