"""Compares two models in one setting after another, up to the first difference."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from conjoin.tracing.copies import Call
from conjoin.verifying.outcome import Key, Pieces
from conjoin.verifying.running import LeastPrecise, run
from conjoin.verifying.settings import Setting, settings_for
from conjoin.verifying.unlike import first_unlike, tolerance_of
from conjoin.verifying.verification import Difference, Verification

ROUNDING_UNITS = 10
"""The room for a less precise dtype inside a converted model. Its wide layers run in float64, so
all that can differ is to which side a number is rounded: by one unit, and some more further on."""


@dataclass
class Comparison:
    """What was found so far."""

    converted: bool
    settings: tuple[Setting, ...]
    dtype: torch.dtype = torch.float64
    difference: Difference | None = None
    failure: Exception | None = None
    ran: int = 0
    raised: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    largest: float = 0.0
    compared: set[Key] = dataclasses.field(default_factory=set)

    def add(self, setting: Setting, number: int, left: Pieces, failure: Exception | None) -> None:
        """Notes what a call of the original left behind."""
        self.ran += 1
        self.compared |= {key for key, piece in left.items() if piece.values is not None}
        if failure is not None:
            self.failure = self.failure or failure
            self.raised.add((setting.where, number))

    def tolerance(self) -> float:
        """The relative difference that is allowed."""
        tolerance = tolerance_of(self.dtype)
        if not self.converted:
            return tolerance
        rounding = ROUNDING_UNITS * torch.finfo(self.dtype).eps
        return max(tolerance_of(torch.float64), min(tolerance, rounding))

    def result(self, calls: int) -> Verification:
        """What the user gets."""
        kinds = [kind for kind, _ in self.compared]
        return Verification(
            difference=self.difference,
            calls=calls,
            modes=tuple(setting.where for setting in self.settings),
            converted=self.converted,
            dtype=self.dtype,
            outputs=kinds.count("output"),
            gradients=kinds.count("gradient"),
            buffers=kinds.count("buffer"),
            raised=len(self.raised),
            largest=self.largest,
        )


def compare(
    original: nn.Module, optimized: nn.Module, calls: Sequence[Call], *, convert: bool
) -> Comparison:
    """Runs both models up to the first difference."""
    found = Comparison(convert, settings_for(original))
    lifted = _liftable(original)
    for setting in found.settings:
        watch = LeastPrecise()
        theirs = run(original, calls, setting, convert, watch)
        ours = run(optimized, calls, setting, convert, contextlib.nullcontext())
        found.dtype = max(found.dtype, watch.dtype, key=tolerance_of)
        for number, ((expected, failure), (actual, _)) in enumerate(zip(theirs, ours, strict=True)):
            expected, actual = (_without(lifted, each) for each in (expected, actual))
            found.add(setting, number, expected, failure)
            unlike, largest = first_unlike(actual, expected, found.tolerance())
            found.largest = max(found.largest, largest)
            if unlike is not None:
                found.difference = Difference(setting.where, number + 1, *unlike)
                return found
    return found


def _liftable(original: nn.Module) -> tuple[str, ...]:
    """What the attributes begin with of modules in graphs that only hold tensors.

    In the optimized model a layer may stand there, which has settings.
    """
    return tuple(
        f"attribute {path}."
        for path, module in original.named_modules()
        if type(module) is nn.Module and not module._modules
    )


def _without(names: tuple[str, ...], pieces: Pieces) -> Pieces:
    """The pieces but for attributes that begin with one of these names."""
    if not names:
        return pieces
    return {
        (kind, name): piece
        for (kind, name), piece in pieces.items()
        if kind != "attribute" or not name.startswith(names)
    }
