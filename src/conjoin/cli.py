"""The command line: `conjoin report | optimize | unfuse | export`.

Exit status 0: done. 2: wrong input, with one sentence on stderr. 130: interrupted.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

import conjoin
from conjoin.files import exporting, writing
from conjoin.files.loading import load
from conjoin.foreign import SavedError, quote, unremarked
from conjoin.memory import MemoryBudgetWarning
from conjoin.options import UsageError, arguments, budget, example, input_specs
from conjoin.policy.figures import Policy
from conjoin.tracing.observe import TUPLE

_SAVED_HELP = (
    "a .pt2 file of torch.export.save, a model saved whole by torch.save "
    "(needs --trust-pickle), or package.module:factory"
)
_EPILOG = """\
examples:
  conjoin report torchvision.models:googlenet --input 8x3x224x224
  conjoin report model.pt2 --format markdown
  conjoin report model.pt --trust-pickle --input 64x1x28x28
  conjoin report mypackage.nets:build --arg 12 --arg width=64 --input tokens=1x128:int64
  conjoin optimize model.pt -o fused.pt --trust-pickle --input 64x1x28x28
  conjoin unfuse fused.pt -o plain.pt --trust-pickle
  conjoin optimize model.pt2 -o fused.pt2
  conjoin export fused.pt -o plain.onnx --trust-pickle --input 64x1x28x28 --dynamic-batch
"""

_INPUTS = (
    "Give what its forward takes with --input: shapes, dtypes and, where it needs them, names."
)
_NOT_RUN = "not verified: the program has no inputs to run it on"
_UNVERIFIED = {
    False: "not verified: there are no inputs to run the model on (give them with --input)",
    True: "not verified, as --no-verify says",
}

_Inputs = tuple[
    "nn.Module | ExportedProgram", "tuple[object, ...] | None", "dict[str, object] | None"
]


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # `--trust` is not `--trust-pickle`: what runs code or replaces files is spelled out.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; those of the process where None.

    Returns:
        The exit status: 0 done, 2 wrong input, 130 interrupted.
    """
    _tolerate_narrow_encodings()
    try:
        options = _parser().parse_args(_checked(sys.argv[1:] if argv is None else argv))
        run: Callable[[argparse.Namespace], str] = options.run
        with _current_folder():
            with redirect_stdout(sys.stderr):  # What the model prints is not the result.
                result = run(options)
            _emit(result)
    except (UsageError, SavedError) as error:
        _complain(f"error: {_one_line(str(error))}")
        return 2
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    return 0


def _checked(argv: Sequence[str]) -> Sequence[str]:
    """The arguments, of which argparse would take a value `--` for none."""
    for argument in argv:
        if argument.startswith("-") and argument.partition("=")[2] == "--":
            raise UsageError(f"{argument} gives no value: write one after the =")
    return argv


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="conjoin",
        description="Find sibling layers of a PyTorch model and run them as one wide layer.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"conjoin {conjoin.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    report = commands.add_parser("report", help="say what can be fused, and what not and why")
    _add_saved(report)
    _add_inputs(report)
    _add_choices(report)
    report.add_argument(
        "--format",
        choices=("table", "markdown", "json"),
        default="table",
        help="how to print the report (default: table)",
    )
    report.set_defaults(run=_report)

    optimize = commands.add_parser("optimize", help="write the model with its siblings fused")
    _add_saved(optimize)
    _add_inputs(optimize)
    _add_choices(optimize)
    _add_out(optimize)
    optimize.add_argument(
        "--no-verify",
        action="store_true",
        help="write without running the model on its inputs, fused and as it was, to compare",
    )
    optimize.set_defaults(run=_optimize)

    unfuse = commands.add_parser("unfuse", help="write the model with its original layers")
    _add_saved(unfuse)
    _add_out(unfuse)
    unfuse.set_defaults(run=_unfuse)

    export = commands.add_parser(
        "export", help="write the model for inference, as a .pt2 or .onnx file, run and compared"
    )
    _add_saved(export)
    _add_inputs(export)
    _add_out(export)
    export.add_argument(
        "--fused",
        action="store_true",
        help="with the siblings fused (default: with the original layers)",
    )
    export.add_argument(
        "--dynamic-batch",
        action="store_true",
        help="for any size of the first dimension that the inputs have in common",
    )
    export.set_defaults(run=_export)
    return parser


def _add_saved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("saved", metavar="SAVED", help=_SAVED_HELP)
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="unpickle SAVED, which runs code that the file names: only for files you trust",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="[NAME=]VALUE",
        help="an argument of the factory: a Python literal, else a string; repeatable",
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="an example input such as 1x3x224x224, 8, scalar or 1x128:int64, in the order of the "
        "model's arguments or by name (default dtype float32; integers are zeros, bools true); "
        "repeatable",
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        choices=get_args(Policy),
        default="auto",
        help="which groups to fuse: those that an estimate is not against, all, or those that are "
        "quicker when timed (default: auto)",
    )
    parser.add_argument(
        "--memory-budget",
        type=budget,
        metavar="SIZE",
        help="what a call may need: bytes, such as 8GiB or 500MB, or a fraction of the device's "
        "memory, such as 0.5",
    )


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


# Commands: each gives the text to print.


def _report(options: argparse.Namespace) -> str:
    model, inputs, kwargs = _model_and_inputs(options)
    with _wrong_inputs():
        report = conjoin.report(
            model,
            inputs,
            example_kwargs=kwargs,
            policy=options.policy,
            memory_budget=options.memory_budget,
        )
    if options.format == "json":
        return report.to_json()
    return report.to_markdown() if options.format == "markdown" else str(report)


def _optimize(options: argparse.Namespace) -> str:
    writing.check_out(options.out, source=options.saved, force=options.force)
    model, inputs, kwargs = _model_and_inputs(options)
    writing.check_suffix(model, options.out)
    fused: nn.Module | ExportedProgram
    original: nn.Module | ExportedProgram | None = None
    with _wrong_inputs(), warnings.catch_warnings():
        warnings.simplefilter("ignore", MemoryBudgetWarning)  # The report says it too.
        limits = {"policy": options.policy, "memory_budget": options.memory_budget}
        if isinstance(model, ExportedProgram):
            runs = inputs is not None or bool(model.example_inputs)
            original = model if runs and not options.no_verify else None
            fused = conjoin.optimize(model, **limits)
        else:
            if inputs is not None and not options.no_verify:
                original = _duplicate(model)
            fused = conjoin.optimize(model, inputs, example_kwargs=kwargs, inplace=True, **limits)
        budget = None if isinstance(fused, ExportedProgram) else options.memory_budget
        report = conjoin.report(fused, inputs, example_kwargs=kwargs, memory_budget=budget)
        verdict = _UNVERIFIED[options.no_verify]
        if original is not None:
            verdict = _verified(conjoin.verify(original, fused, inputs, example_kwargs=kwargs))
    writing.write(fused, options.out, force=options.force)
    return f"{report}\n\n{verdict}\nwrote {options.out}"


def _duplicate(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # Code of the model's own copies it, which may raise anything.
        raise UsageError(
            f"the model cannot be copied to verify it ({quote(error)}): --no-verify writes it "
            "unverified"
        ) from error


def _verified(verification: conjoin.Verification, hint: str = " (--no-verify would)") -> str:
    if not verification:
        raise UsageError(
            f"the fused model is another function, so nothing is written{hint}: "
            f"{verification.difference}"
        )
    return str(verification)


def _unfuse(options: argparse.Namespace) -> str:
    writing.check_out(options.out, source=options.saved, force=options.force)
    model = _load(options)
    writing.check_suffix(model, options.out)
    if not isinstance(model, ExportedProgram):
        with _wrong_inputs():
            whole = conjoin.unfuse(model, inplace=True)
        writing.write(whole, options.out, force=options.force)
        return f"wrote {options.out}"
    with _wrong_inputs():
        plain = conjoin.unfuse(model)
        verdict = _NOT_RUN
        if model.example_inputs:
            verdict = _verified(conjoin.verify(plain, model), hint="")
    writing.write(plain, options.out, force=options.force)
    return f"{verdict}\nwrote {options.out}"


def _export(options: argparse.Namespace) -> str:
    exporting.check_format(options.out)
    writing.check_out(options.out, source=options.saved, force=options.force)
    model, inputs, kwargs = _model_and_inputs(options)
    if isinstance(model, ExportedProgram) and inputs is None and model.example_inputs:
        inputs, kwargs = model.example_inputs
    if inputs is None:
        raise UsageError("there are no inputs to export the model with: give them with --input")
    with _wrong_inputs():
        verdict = exporting.export(
            model,
            options.out,
            (inputs, kwargs or {}),
            fused=options.fused,
            dynamic_batch=options.dynamic_batch,
            force=options.force,
        )
    return f"{verdict}\nwrote {options.out}"


def _load(options: argparse.Namespace) -> nn.Module | ExportedProgram:
    given, folder = arguments(options.arg), os.getcwd()
    try:
        return load(options.saved, trust_pickle=options.trust_pickle, arguments=given)
    finally:
        os.chdir(folder)  # A factory may have gone elsewhere, and OUT is a name in this one.


def _model_and_inputs(options: argparse.Namespace) -> _Inputs:
    specs = input_specs(options.input)
    if not specs and getattr(options, "memory_budget", None) is not None:
        raise UsageError("--memory-budget needs --input, which tells how large the tensors are")
    if not specs and getattr(options, "policy", None) == "measure":
        raise UsageError("--policy measure needs --input, which tells what to time layers on")
    model = _load(options)
    if not specs:
        return model, None, None
    device = _device_of(model)
    inputs: tuple[object, ...] = tuple(example(s, device) for s in specs if s.name is None)
    keywords: dict[str, object] = {s.name: example(s, device) for s in specs if s.name}
    return model, inputs, keywords or None


def _device_of(model: nn.Module | ExportedProgram) -> torch.device:
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.values()]
    else:
        tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def _wrong_inputs() -> Iterator[None]:
    """The library says in one sentence what is wrong with a model or its inputs."""
    try:
        with unremarked():
            yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error).replace(TUPLE, _INPUTS)) from error
    except SystemExit as error:
        raise UsageError(f"the model's code ends the process: {quote(error)}") from error


# The process


@contextmanager
def _current_folder() -> Iterator[None]:
    """The console script can import what `python -m conjoin` can."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        raise UsageError("the current folder is gone: change to one that exists") from None
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(folder)


def _complain(text: str) -> None:
    if sys.stderr is None:  # It was closed, and `print` would take the standard output.
        return
    try:
        print(f"conjoin: {text}", file=sys.stderr, flush=True)
    except OSError:  # There is nobody to tell, and the exit status tells.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _emit(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A reader that has had enough (`| head`) is no error.
        if not isinstance(error, BrokenPipeError):
            raise UsageError(f"cannot print the result: {error.strerror}") from error


def _tolerate_narrow_encodings() -> None:
    # A name that the terminal cannot show must not cost the report.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _one_line(text: str) -> str:
    """One line without control characters: parts of it come from files."""
    joined = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in joined)
