"""Exports a model to a file for inference, runs that file, and compares it with the model.

    model -> unfuse -> torch.export -> optimize, if asked -> .pt2, or through torch.onnx -> .onnx

What the file computes is compared with what the model computed before anything was done to it. The
file takes its place only where they agree.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

import conjoin
from conjoin.files.writing import placing, save
from conjoin.foreign import SavedError, foreign, quiet, quote
from conjoin.graph.meta import VALUE
from conjoin.tracing.copies import Call
from conjoin.tracing.exported import arguments_by_schema
from conjoin.tracing.keeping import KeepingTensors
from conjoin.tracing.modes import start_streams
from conjoin.tracing.undisturbed import undisturbed
from conjoin.verifying import outcome
from conjoin.verifying.unlike import first_unlike, tolerance_of

SEED = 20
"""Where the random streams start for each run, so that what draws numbers draws the same ones."""

ERRORS_ONLY = 3
"""ONNX Runtime's level of logging at which it tells errors, and no warnings."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What it takes to write an ONNX file and to run it."""


def check_format(out: str) -> None:
    """Refuses an output that is of no known format, or that takes packages that are missing.

    Raises:
        SavedError: the name ends in neither `.pt2` nor `.onnx`, or a package is not installed.
    """
    suffix = Path(out).suffix
    if suffix not in _WRITERS:
        raise SavedError(f"{out} tells no format to export to: let its name end in .pt2 or .onnx")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if suffix == ".onnx" and missing:
        raise SavedError(
            f"an .onnx file cannot be written and run without {' and '.join(missing)}: install "
            "them with pip install 'conjoin[onnx]'"
        )


def export(
    model: nn.Module | ExportedProgram,
    out: str,
    call: Call,
    *,
    fused: bool = False,
    dynamic_batch: bool = False,
    force: bool = False,
) -> str:
    """Exports a model in evaluation mode, runs the file, compares it, and puts it at its place.

    Args:
        model: the model, optimized or not, which is changed; or an exported program.
        out: the file, whose name ends in `.pt2` or `.onnx`.
        call: the positional and keyword arguments to export it with and to run it on.
        fused: with the siblings merged; otherwise with the original layers.
        dynamic_batch: for any size of the first dimension that the first input has, and of those
            of the other inputs that are as large.
        force: replace `out` where it exists.

    Returns:
        What was compared and what was merged.

    Raises:
        SavedError: the model does not run, cannot be exported or written, or the file gives
            something else; or a program was exported in training mode.
    """
    if isinstance(model, ExportedProgram) and dynamic_batch:
        raise SavedError(
            "an exported program has its sizes already: export the model that it came from with "
            "--dynamic-batch"
        )
    if isinstance(model, ExportedProgram) and _is_training(model):
        raise SavedError(
            "the program was exported in training mode, which its operations say: export the model "
            "in evaluation mode, after model.eval()"
        )
    if isinstance(model, nn.Module) and any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise SavedError(
            "the model has lazy layers, whose parameters have no shape yet: run it once on an "
            "example input, and export it then"
        )
    calls = [call]
    batched = _batched(call) if dynamic_batch else []
    if dynamic_batch:
        calls.append(_doubled(call, batched))
    with foreign("the model does not run on the inputs"), quiet(prints=True):
        runs = model.module() if isinstance(model, ExportedProgram) else model.eval()
        expected = [_run(runs, each, runs) for each in calls]
    plain = _plain(model, call, batched)
    most = _largest_batch(plain) if dynamic_batch else None
    if most is not None and most < len(calls) * len(batched[0]):
        raise SavedError(
            f"the model is exported for batches of {most} at most, and what is exported is run on "
            f"twice the batch of the inputs: give --input shapes of a batch of {most // 2} or less"
        )
    program, merged = plain, ""
    if fused:
        # Not the model: where Python decides, its layers would be exported one by one.
        with quiet(prints=True):
            program = conjoin.optimize(plain)
        merged = _merged(plain, program)
    write, opened = _WRITERS[Path(out).suffix]
    with placing(out, force=force) as temporary:
        with foreign(f"the model cannot be written as {out}"), quiet(prints=True):
            write(program, temporary)
        with foreign("what was exported does not run"), quiet(prints=True):
            run = opened(temporary)
            actual = [_run(run, each) for each in calls]
        largest = _compared(actual, expected, _tolerance(runs, expected))
    count = len(expected[0])
    sizes = " and twice as large a batch" if dynamic_batch else ""
    limit = "" if most is None else f"\nfor batches of {most} at most, which the model decides"
    return (
        f"equal: {count} output{'' if count == 1 else 's'} of {out} on the inputs{sizes}; "
        f"largest difference {largest:.1e}{limit}{merged}"
    )


def _is_training(program: ExportedProgram) -> bool:
    """Whether an operation of a program is written as in training mode."""
    graphs = (m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule))
    operations = (n for graph in graphs for n in graph.nodes if isinstance(n.target, OpOverload))
    given = map(arguments_by_schema, operations)
    return any(each.get("training") is True or each.get("train") is True for each in given)


def _merged(program: ExportedProgram, wide: ExportedProgram) -> str:
    """What was merged, as a line."""
    before, after = {*program.state_dict}, {*wide.state_dict}
    if before == after:
        return "\nfused: nothing could be merged"
    return f"\nfused: {len(before - after)} tensors of layers became {len(after - before)}"


Outputs = list[Tensor]
"""The tensors that a call gives."""


def _run(function: Callable[..., Any], call: Call, model: nn.Module | None = None) -> Outputs:
    """The tensors that a call gives, on inputs of its own; the model stays as it is."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), call)
    with undisturbed(model), torch.no_grad(), KeepingTensors():
        start_streams(SEED)
        return [t.detach().cpu().clone() for t in _tensors(function(*args, **kwargs))]


def _tensors(value: object) -> Outputs:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _batched(call: Call) -> Outputs:
    """The inputs whose first dimension is that of the first input."""
    inputs = [tensor for tensor in _tensors(call) if tensor.dim()]
    if not inputs or inputs[0].shape[0] < 2:
        raise SavedError(
            "a batch of one does not tell which sizes depend on it: give --input shapes with a "
            "batch of 2 or more for --dynamic-batch"
        )
    return [tensor for tensor in inputs if tensor.shape[0] == inputs[0].shape[0]]


def _doubled(call: Call, batched: Sequence[Tensor]) -> Call:
    """The same call with the batch twice."""
    known = {*map(id, batched)}
    doubled: Call = pytree.tree_map_only(
        Tensor, lambda tensor: torch.cat([tensor] * 2) if id(tensor) in known else tensor, call
    )
    return doubled


def _plain(
    model: nn.Module | ExportedProgram, call: Call, batched: Sequence[Tensor]
) -> ExportedProgram:
    """The program with the original layers."""
    if isinstance(model, ExportedProgram):
        return conjoin.unfuse(model)
    model = conjoin.unfuse(model, inplace=True)
    with foreign("torch.export cannot export the model"), quiet(prints=True), undisturbed(model):
        return _program(model, call, batched)


def _program(model: nn.Module, call: Call, batched: Sequence[Tensor]) -> ExportedProgram:
    """The program of a model, for any batch or up to the limit that the model sets."""
    if not batched:
        return _exported(model, call)
    try:
        return _exported(model, call, batched, Dim("batch"))
    except UserError:
        # This notes all that must hold of a batch, and the export after it allows a limit alone.
        most = _largest_batch(_exported(model, call, batched, Dim.DYNAMIC))
        if most is None:
            raise
    return _exported(model, call, batched, Dim("batch", max=most))


def _exported(
    model: nn.Module, call: Call, batched: Sequence[Tensor] = (), batch: object = None
) -> ExportedProgram:
    """The program of a model, with a first dimension of some inputs that is `batch`."""
    args, kwargs = call
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    for tensor in batched:
        shapes[tensor] = {0: batch}
    dynamic = shapes.dynamic_shapes(model, args, kwargs) if batched else None  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)


def _largest_batch(program: ExportedProgram) -> int | None:
    """The largest batch that a program is for; None where there is no limit."""
    inputs = (n.meta.get(VALUE) for n in program.graph.nodes if n.op == "placeholder")
    sizes: list[Any] = [v.shape[0] for v in inputs if isinstance(v, Tensor) and v.dim()]
    symbols = {size.node.expr for size in sizes if isinstance(size, torch.SymInt)}
    ranges = program.range_constraints  # Of a size that follows from another there is none.
    limits = [ranges[each].upper for each in symbols if each in ranges]
    return min((int(limit) for limit in limits if limit.is_Integer), default=None)


def _compared(actual: list[Outputs], expected: list[Outputs], tolerance: float) -> float:
    """The largest difference.

    Raises:
        SavedError: there is a difference beyond rounding.
    """
    found, wanted = (outcome.described("output", "output", each) for each in (actual, expected))
    unlike, largest = first_unlike(found, wanted, tolerance)
    if unlike is not None:
        number = unlike[0].removeprefix("output")
        raise SavedError(
            "what was exported is another function, so nothing is written: "
            f"output{number[number.find(']') + 1 :]} {unlike[1]}"
        )
    return largest


def _tolerance(model: nn.Module, outputs: list[Outputs]) -> float:
    """What the least precise tensor allows."""
    tensors = (*model.parameters(), *model.buffers(), *(t for each in outputs for t in each))
    return max((tolerance_of(tensor.dtype) for tensor in tensors), default=0.0)


# Formats


def _open_pt2(path: Path) -> Callable[..., Any]:
    return torch.export.load(path).module()


def _native_group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_group_norm` by operations that ONNX Runtime has for float64 as well."""
    rows = input.reshape(samples, groups, -1)
    mean = rows.mean(-1, keepdim=True)
    centred = rows - mean
    scale = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    output, shape = (centred * scale).reshape(input.shape), (channels, *[1] * (input.dim() - 2))
    output = output if weight is None else output * weight.reshape(shape)
    output = output if bias is None else output + bias.reshape(shape)
    return output, mean.squeeze(-1), scale.squeeze(-1)


def _group_norm(
    input: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Tensor:
    """`aten.group_norm` likewise."""
    samples, channels = input.shape[:2]
    return _native_group_norm(input, weight, bias, samples, channels, 0, groups, eps)[0]


GROUP_NORMS: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.native_group_norm.default: _native_group_norm,
}
"""Operations that merged LayerNorms become, which ONNX writes as one of float32 and float16."""


def _without_group_norms(program: ExportedProgram) -> ExportedProgram:
    """The program with other operations in the place of group norms of float64."""
    values = (n.args[0].meta[VALUE] for n in program.graph.nodes if n.target in GROUP_NORMS)
    if all(value.dtype is not torch.float64 for value in values):
        return program
    written: ExportedProgram = program.run_decompositions(GROUP_NORMS)
    return written


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    written = torch.onnx.export(_without_group_norms(program), dynamo=True, verbose=False)
    assert written is not None  # dynamo=True gives a program
    written.save(path, external_data=False)


def _open_onnx(path: Path) -> Callable[..., Any]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise SavedError(
            f"ONNX Runtime does not run the model ({quote(error)}): of float64 and other types it "
            "has fewer operations than of float32, so export the model in that, after model.float()"
        ) from error
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> Outputs:
        given = [tensor.cpu().numpy() for tensor in _tensors((args, kwargs))]
        found = session.run(None, dict(zip(names, given, strict=True)))
        return [torch.from_numpy(array) for array in found]

    return run


_Write = Callable[[ExportedProgram, Path], None]
_Open = Callable[[Path], Callable[..., Any]]

_WRITERS: Mapping[str, tuple[_Write, _Open]] = {
    ".pt2": (save, _open_pt2),
    ".onnx": (_write_onnx, _open_onnx),
}
"""How a file of each suffix is written, and how it is opened to be run."""
