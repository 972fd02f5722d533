"""Finds what differs first between what two models left behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import Tensor, nn

from conjoin.verifying.outcome import Piece, Pieces, piece_of

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-2,
}
"""The largest difference allowed where numbers of this dtype were computed, relative to the largest
number in the tensor, or to 1, or to the largest of its kind where all are smaller than 1.

Merging layers changes the order in which products are summed, not which, so what differs is
rounding: some units in the last digit for each layer, which deep models amplify. Each tolerance
leaves room for that (in float64 six digits above its precision, in float32 three), and is far below
what a wrong value, scale or sign gives. The least precise dtype in a computation decides.
"""

SMALLEST_SCALE = 1e-3
"""Where everything cancels, nothing but rounding is left, and is no scale to measure by."""

LONGEST = 120
"""The characters of a value that are told."""

Unlike = tuple[str, str]
"""What differs, and in which way."""


def unlike_weights(actual: nn.Module, expected: nn.Module) -> Unlike | None:
    """What differs first between the checkpoints of two models, to the bit."""
    ours, theirs = (
        {("output", name): piece_of(value) for name, value in model.state_dict().items()}
        for model in (actual, expected)
    )
    unlike, _ = first_unlike(ours, theirs, 0.0)
    if unlike is not None:
        return unlike
    other = (key for key, piece in theirs.items() if not _same_bits(ours[key], piece))
    return next(((name, "has other bits") for _, name in other), None)


def _same_bits(actual: Piece, expected: Piece) -> bool:
    """Equal numbers may still be zeros of another sign, or other kinds of NaN."""
    if actual.values is None or expected.values is None:
        return True
    return _bytes(actual.values).equal(_bytes(expected.values))


def _bytes(values: Tensor) -> Tensor:
    return _strided(values).resolve_conj().contiguous().flatten().view(torch.uint8)


def first_unlike(actual: Pieces, expected: Pieces, tolerance: float) -> tuple[Unlike | None, float]:
    """What differs first.

    Args:
        actual: what one model left behind.
        expected: what the other did, which says how it should be.
        tolerance: the difference of inexact numbers that is allowed, relative to their scale.

    Returns:
        What differs and in which way, if anything does; and the largest difference of two numbers
        up to there.
    """
    largest = 0.0
    for kind in dict.fromkeys(kind for kind, _ in (*expected, *actual)):
        ours, theirs = (
            {k[1]: p for k, p in all.items() if k[0] == kind} for all in (actual, expected)
        )
        unlike, error = _first_of_kind(ours, theirs, tolerance)
        largest = max(largest, error)
        if unlike is not None:
            return unlike, largest
    return None, largest


def _first_of_kind(
    actual: Mapping[str, Piece], expected: Mapping[str, Piece], tolerance: float
) -> tuple[Unlike | None, float]:
    largest = 0.0
    scale = max((_scale(piece) for piece in expected.values()), default=0.0)
    for name, piece in expected.items():
        if name not in actual:
            return (name, "is missing"), largest
        how, error = _how(actual[name], piece, tolerance, scale)
        if how is not None:
            return (name, how), largest
        largest = max(largest, error)
    for ours, theirs in zip_longest(actual, expected):
        if ours not in expected:
            return (ours, "is there, and not in the original"), largest
        if ours != theirs:
            return (ours, f"stands in the place of {theirs}"), largest
    return None, largest


def _how(
    actual: Piece, expected: Piece, tolerance: float, scale: float
) -> tuple[str | None, float]:
    """In which way two parts differ, if they do, and the largest difference of two numbers."""
    if actual.shared and expected.facts == piece_of(None).facts and _is_zero(actual):
        return None, 0.0
    for label, fact in expected.facts.items():
        found = actual.facts.get(label)
        if found != fact:
            return f"{label} {_shortened(str(found))} instead of {_shortened(fact)}", 0.0
    if actual.values is None or expected.values is None:
        return None, 0.0
    error = _error(actual.values, expected.values)
    allowed = 0.0
    if is_inexact(expected.values.dtype):
        scale = max(_scale(expected), min(max(scale, SMALLEST_SCALE), 1.0))
        allowed = tolerance * scale
    if error > allowed:
        limit = f" where {allowed:.1e} is allowed" if allowed else ""
        return f"differs by {error:.1e}{limit}", error
    return None, error


def _is_zero(piece: Piece) -> bool:
    return piece.values is not None and not _plain(piece.values).any()


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two numbers; NaN is like NaN, and infinity like infinity."""
    if not is_inexact(expected.dtype):
        unequal = not torch.equal(_strided(actual), _strided(expected))
        return max(_distance(actual, expected), 1.0) if unequal else 0.0  # Beyond 2**53, too.
    return _distance(actual, expected)


def _distance(actual: Tensor, expected: Tensor) -> float:
    actual, expected = _plain(actual), _plain(expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    errors = (actual - expected).abs()[~same].nan_to_num(nan=math.inf, posinf=math.inf)
    return float(errors.max()) if errors.numel() else 0.0


def _scale(piece: Piece) -> float:
    """The largest finite number of a piece."""
    if piece.values is None or not is_inexact(piece.values.dtype):
        return 0.0
    plain = _plain(piece.values).abs()
    plain = plain[plain.isfinite()]
    return float(plain.max()) if plain.numel() else 0.0


def _strided(values: Tensor) -> Tensor:
    values = values.dequantize() if values.is_quantized else values
    return values if values.layout is torch.strided else values.to_dense()


def _plain(values: Tensor) -> Tensor:
    """The values in a dtype that holds them all and can be calculated with."""
    exact = torch.complex128 if values.is_complex() else torch.float64
    return _strided(values).to(exact)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference that is allowed where numbers of this dtype were computed."""
    if not is_inexact(dtype):
        return 0.0
    return TOLERANCE.get(dtype, torch.finfo(dtype).eps)


def is_inexact(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are rounded."""
    return dtype.is_floating_point or dtype.is_complex


def _shortened(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= LONGEST else f"{joined[: LONGEST - 3]}..."
