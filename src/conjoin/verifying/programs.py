"""Compares two exported programs, by the original names of their tensors.

A program is in the mode that it was exported in, and computes in the types that are written in its
graph; so it is run as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from conjoin.programs.program import duplicate, record_of
from conjoin.programs.raised import aliases
from conjoin.programs.record import originals
from conjoin.tracing.copies import Call
from conjoin.tracing.modes import start_streams, unrounded
from conjoin.tracing.undisturbed import undisturbed
from conjoin.verifying import outcome
from conjoin.verifying.comparison import Comparison
from conjoin.verifying.outcome import Pieces
from conjoin.verifying.running import SEED, LeastPrecise, attempt, backward
from conjoin.verifying.settings import EXPORTED
from conjoin.verifying.unlike import first_unlike, tolerance_of
from conjoin.verifying.verification import Difference


def compare_programs(
    original: ExportedProgram, optimized: ExportedProgram, calls: Sequence[Call]
) -> Comparison:
    """Runs two exported programs on each call by itself, up to the first difference."""
    found = Comparison(False, (EXPORTED,))
    with undisturbed(), unrounded(), torch.inference_mode(False), torch.enable_grad():
        for number, call in enumerate(calls):
            watch = LeastPrecise()
            with watch:
                expected, failure = left_behind(original, call, SEED + number)
            actual, _ = left_behind(optimized, call, SEED + number)
            found.dtype = max(found.dtype, watch.dtype, key=tolerance_of)
            found.add(EXPORTED, number, expected, failure)
            unlike, largest = first_unlike(actual, expected, found.tolerance())
            found.largest = max(found.largest, largest)
            if unlike is not None:
                found.difference = Difference(EXPORTED.where, number + 1, *unlike)
                break
    return found


def left_behind(program: ExportedProgram, call: Call, seed: int) -> tuple[Pieces, Exception | None]:
    """Runs a copy of a program, and takes apart what is there afterwards.

    Args:
        program: the program.
        call: the arguments of the call.
        seed: what the random streams start from.

    Returns:
        The pieces, and what the forward pass raised.
    """
    module = duplicate(program).module(check_guards=False)
    args, kwargs = copy.deepcopy(call)
    start_streams(seed)
    output, failure = attempt(lambda: module(*args, **kwargs))
    left: Pieces = {("error", "the forward pass"): outcome.raised(failure, message=False)}
    if failure is None:
        left |= outcome.described("output", "output", output)
    for arguments in (args, kwargs):
        left |= outcome.described("input", "input", arguments)
    if failure is None:
        _, broken = attempt(lambda: backward(output))
        left["error", "the backward pass"] = outcome.raised(broken, message=False)
    for name, tensor, gradient, shared in _tensors(program, module):
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        left[kind, f"{kind} {name}"] = outcome.piece_of(tensor.detach())
        if kind == "parameter" and failure is None:
            piece = dataclasses.replace(outcome.piece_of(gradient), shared=shared)
            left["gradient", f"gradient of {name}"] = piece
    return left | outcome.streams(), failure


def _tensors(
    program: ExportedProgram, module: nn.Module
) -> Iterator[tuple[str, Tensor, Tensor | None, bool]]:
    """The parameters and buffers, their gradients, and whether they are parts of wide ones."""
    held: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found = record_of(program)
    gradients = {name: tensor.grad for name, tensor in held.items() if tensor.grad is not None}
    parts = originals(found, held) if found else {}
    part_gradients = originals(found, gradients) if found else {}
    wholes = {name: whole for name, (whole, *_) in found["tensors"].items()} if found else {}
    also = aliases(program) | (found["also"] if found else {})
    own: dict[str, Tensor] = {}
    for name, tensor in held.items():
        read = also.get(name, name)
        # In a file's program each name has a Parameter, and the one that is read has gradients.
        if name not in wholes.values() and (read not in own or own[read].grad is None):
            own[read] = tensor
    first: dict[str, str] = {}  # Of several names of one tensor the first is told.
    for name in found["order"] if found else program.state_dict:
        first.setdefault(also.get(name, name), name)
    for told, name in sorted((first.get(name, name), name) for name in {*own, *parts}):
        if name in own:
            yield told, own[name], own[name].grad, False
            continue
        trains = isinstance(held[wholes[name]], nn.Parameter)
        part = nn.Parameter(parts[name]) if trains else parts[name]
        yield told, part, part_gradients.get(name), True
