"""Parses the options of the command line: `--arg`, `--input`, `--memory-budget`."""

from __future__ import annotations

import argparse
import ast
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from conjoin.files.loading import Arguments
from conjoin.tracing.modes import unmoved_streams

# A typing slip in --input must not fill the memory; real example inputs are far smaller.
MAX_INPUT_BYTES = 4 * 2**30

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
_SHAPE = re.compile(r"scalar|[1-9]\d*(x[1-9]\d*)*")
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *(b|[kmgt]i?b)?", re.IGNORECASE)
_UNITS = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_KEYWORD = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


class UsageError(ValueError):
    """An option that does not parse; the message is one sentence."""


def _named(text: str) -> tuple[str | None, str]:
    match = _KEYWORD.fullmatch(text)
    return (match[1], match[2]) if match else (None, text)


def arguments(texts: Sequence[str]) -> Arguments:
    """Reads arguments of a factory, `[NAME=]VALUE` each.

    Raises:
        UsageError: one does not parse, or a name is given twice.
    """
    positional: list[object] = []
    keywords: dict[str, object] = {}
    for text in texts:
        name, value = _named(text)
        if name is None:
            positional.append(_literal(value))
        elif name in keywords:
            raise UsageError(f"--arg {name}=... is given twice")
        else:
            keywords[name] = _literal(value)
    return Arguments(tuple(positional), keywords)


def _literal(text: str) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's remarks on a string's backslashes.
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        # What opens like a literal was meant as one; anything else is a string without quotes.
        if text.lstrip()[:1] in tuple("([{'\""):
            raise UsageError(f"--arg {text} is not a Python literal: is it closed?") from None
        return text


def budget(text: str) -> float:
    """A fraction where there is a point and no unit, and otherwise bytes.

    Raises:
        ArgumentTypeError: it is neither.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text} is no size such as 8GiB, 500MB, 1000000 or 0.5, a fraction of the device's"
        )
    number, unit = match.groups()
    fraction = unit is None and "." in number
    size = float(number) * (1 if fraction else _UNITS[(unit or "b").lower()])
    if not fraction and size > sys.maxsize:
        raise argparse.ArgumentTypeError(f"{text[:20]}... is more memory than any device has")
    size = size if fraction else int(size)
    if size <= 0 or (fraction and size > 1):
        raise argparse.ArgumentTypeError(
            f"{text} is no size above 0, or no fraction of the device's memory up to 1.0"
        )
    return size


@dataclass(frozen=True)
class InputSpec:
    """`NAME=1x128:int64`, read."""

    text: str
    name: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype


def input_specs(texts: Sequence[str]) -> list[InputSpec]:
    """Reads example inputs, `[NAME=]SHAPE[:DTYPE]` each.

    Raises:
        UsageError: one does not parse, a name comes twice, or one asks for more memory than
            `MAX_INPUT_BYTES`.
    """
    specs = [_input_spec(text) for text in texts]
    names = [spec.name for spec in specs if spec.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--input {name}=... is given twice")
    return specs


def _input_spec(text: str) -> InputSpec:
    """Reads `[NAME=]SHAPE[:DTYPE]`.

    Raises:
        UsageError: it does not parse, or asks for more memory than `MAX_INPUT_BYTES`.
    """
    name, description = _named(text)
    shape_text, _, dtype_text = description.partition(":")
    if not _SHAPE.fullmatch(shape_text):
        raise UsageError(
            f"--input {text} has no shape such as 1x3x224x224, 8 or scalar: sizes from 1 up, "
            "joined by x"
        )
    dtype = _DTYPES.get(dtype_text or "float32")
    if dtype is None:
        raise UsageError(f"--input {text} names no dtype out of {', '.join(_DTYPES)}")
    sizes = [] if shape_text == "scalar" else shape_text.split("x")
    # Python refuses to read a number of thousands of digits.
    large = any(len(size) > len(str(MAX_INPUT_BYTES)) for size in sizes)
    shape = () if large else tuple(map(int, sizes))
    if large or math.prod(shape) * dtype.itemsize > MAX_INPUT_BYTES:
        raise UsageError(f"--input {text} would take over {MAX_INPUT_BYTES // 2**30} GiB of memory")
    return InputSpec(text, name, shape, dtype)


def example(spec: InputSpec, device: torch.device) -> torch.Tensor:
    """A tensor that most models take: noise, or indices of 0, or a mask of true."""
    try:
        if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            fill = spec.dtype is torch.bool
            return torch.full(spec.shape, fill, dtype=spec.dtype, device=device)
        with unmoved_streams():
            torch.manual_seed(0)
            return torch.randn(spec.shape, dtype=spec.dtype, device=device)
    except RuntimeError as error:
        raise UsageError(f"--input {spec.text} cannot be made on {device}: {error}") from error
