"""What a call of a model leaves behind, in pieces that can be compared with another model's.

A piece has facts, such as a type or a shape, which must be the same, and numbers, which must be
close. It goes by its kind and its name; nested containers and objects are taken apart, so that a
difference can be named: `output['hidden'][2].mean`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from types import ModuleType

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from conjoin.layers.part import Part
from conjoin.layers.product import Product
from conjoin.layers.wide import Wide

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

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_OURS = re.compile(r"_?conjoin_")
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_OF_GRAPHS = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - {"training"}
"""What a GraphModule keeps of its graph and its code, which say how it computes and not what."""
_SCALARS = (str, bytes, int, type(None))
_PLAIN = (Tensor, float, complex, dict, list, tuple, set, frozenset, *_SCALARS)
"""What is compared of the attributes of a module; other objects are the model's own business."""


@dataclass(frozen=True)
class Piece:
    """One piece of what a call leaves behind.

    Attributes:
        facts: what must be the same, by what it is called.
        values: a copy of the numbers, which must be close.
        shared: whether it is the gradient of a part of a wide weight.
    """

    facts: Mapping[str, str]
    values: Tensor | None = None
    shared: bool = False


Key = tuple[str, str]
"""The kind of a piece, and its name."""

Pieces = dict[Key, Piece]

Unlike = tuple[str, str]
"""What differs, and in which way."""


# Taking apart


def walk(name: str, value: object, above: tuple[int, ...] = ()) -> Iterator[tuple[str, object]]:
    """A value and, if it is a container or an object, all that is in it, each with a name."""
    yield name, value
    if id(value) in above:
        return
    for key, item in _items(value):
        yield from walk(name + key, item, (*above, id(value)))


def _items(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, (Tensor, ModuleType, *_SCALARS)) or callable(value):
        return []
    if isinstance(value, Mapping):
        return [(f"[{_text(key)}]", item) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=_text)
    if isinstance(value, (tuple, list)):
        return [(f"[{number}]", item) for number, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [(f".{name}", getattr(value, name, None)) for name in names]
    return [(f".{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in a value, those without a shape yet left out."""
    found = (item for _, item in walk("", value) if isinstance(item, Tensor))
    return [tensor for tensor in found if not is_lazy(tensor)]


def _text(value: object) -> str:
    """The value as it is written, without addresses, which differ from copy to copy."""
    return _ADDRESS.sub("0x", repr(value))


def described(kind: str, name: str, value: object) -> Pieces:
    """A value and all that is in it."""
    return {(kind, key): piece_of(item) for key, item in walk(name, value)}


def piece_of(value: object) -> Piece:
    """A value without what is in it."""
    facts = {"is of type": _type(value)}
    values = _values(value)
    if isinstance(value, Tensor) and not is_lazy(value):
        facts |= {
            "has shape": str(tuple(value.shape)),
            "is of dtype": str(value.dtype),
            "is on": str(value.device),
            "has layout": str(value.layout),
            "has requires_grad": str(value.requires_grad),
            "has is_inference": str(value.is_inference()),
        }
    elif values is not None:
        facts["has shape"] = str(tuple(values.shape))
    elif isinstance(value, _SCALARS) or _is_opaque(value):
        facts["is"] = _text(value)
    return Piece(facts, values)


def _is_opaque(value: object) -> bool:
    containers = (Mapping, set, frozenset, tuple, list)
    return not (isinstance(value, containers) or callable(value) or hasattr(value, "__dict__"))


def _type(value: object) -> str:
    cls = nn.Parameter if isinstance(value, Part) else type(value)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


def _values(value: object) -> Tensor | None:
    """The numbers in a tensor, an array or a floating number; None where there are none."""
    if isinstance(value, Tensor):
        return None if is_lazy(value) or value.is_meta else value.detach().clone()
    if isinstance(value, (float, complex)):
        dtype = torch.complex128 if isinstance(value, complex) else torch.float64
        return torch.tensor(value, dtype=dtype)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.number)):
        array = numpy.array(value)
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else None
    return None


def raised(error: Exception | None, *, message: bool) -> Piece:
    """The type of an error, and its message if that must be the same, too."""
    if error is None:
        return Piece({"raises": "nothing"})
    words = _ADDRESS.sub("0x", f": {error}") if message else ""
    return Piece({"raises": type(error).__qualname__ + words})


def gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> Pieces:
    """The gradients of the inputs, and of the parameters by the names that they had."""
    pieces = {
        ("gradient", f"gradient of {name}"): piece_of(leaf.grad) for name, leaf in inputs.items()
    }
    for name, parameter in _parameters(model):
        piece = piece_of(parameter.grad)
        shared = isinstance(parameter, Part)
        pieces["gradient", f"gradient of {name}"] = dataclasses.replace(piece, shared=shared)
    return pieces


def state(model: nn.Module) -> Pieces:
    """Parameters, buffers and attributes."""
    pieces = {
        ("parameter", f"parameter {name}"): piece_of(parameter)
        for name, parameter in _parameters(model)
    }
    for path, module in _modules(model):
        for name, buffer in module.named_buffers(path, recurse=False):
            pieces["buffer", f"buffer {name}"] = piece_of(buffer)
        for name, value in attributes(module).items():
            full = f"{path}.{name}".lstrip(".")
            pieces |= described("attribute", f"attribute {full}", value)
    return pieces


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as they were before siblings were merged."""
    for path, module in _modules(model):
        yield from module.named_parameters(path, recurse=False)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The user's own modules."""
    ours = (Wide, Product)
    return ((path, m) for path, m in model.named_modules() if not isinstance(m, ours))


def attributes(module: nn.Module) -> dict[str, object]:
    """The mode of a module, and what its own code keeps on it."""
    internal = _OF_GRAPHS if isinstance(module, fx.GraphModule) else _INTERNAL
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and name not in internal and not _OURS.match(name)
    }


def streams() -> Pieces:
    """The states of the random streams."""
    states: dict[str, object] = {
        "PyTorch": torch.get_rng_state().tolist(),
        "Python": random.getstate(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["CUDA"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["NumPy"] = [
            part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()
        ]
    return {
        ("stream", f"the random stream of {name} afterwards"): Piece(
            {"is in state": _digest(state)}
        )
        for name, state in states.items()
    }


def _digest(state: object) -> str:
    return hashlib.sha256(repr(state).encode()).hexdigest()[:8]


# Comparing


# Comparing


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
