"""Takes apart what a call of a model leaves behind, in pieces that can be compared.

A piece has facts, such as a type or a shape, which must be the same, and numbers, which must be
close. It goes by its kind and its name; nested containers and objects are taken apart, so that a
difference can be named: `output['hidden'][2].mean`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from conjoin.layers.part import Part
from conjoin.layers.product import Product
from conjoin.layers.wide import Wide

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
        return None if is_lazy(value) or value.is_meta else _copied(value.detach())
    if isinstance(value, (float, complex)):
        dtype = torch.complex128 if isinstance(value, complex) else torch.float64
        return torch.tensor(value, dtype=dtype)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.number)):
        array = numpy.array(value)
        return torch.from_numpy(array) if array.dtype.kind in "biufc" else None
    return None


def _copied(tensor: Tensor) -> Tensor:
    """A copy where there is more memory than on a device: much is kept until it is compared."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


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
