"""The kinds of layer that conjoin knows, one file a kind, and the wide layer with its views."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from conjoin.layers import convolved, product
from conjoin.layers.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from conjoin.layers.embedding import Embedding
from conjoin.layers.kind import Kind
from conjoin.layers.linear import Linear
from conjoin.layers.norm import NORMALIZATIONS, Norm
from conjoin.layers.prelu import PReLU
from conjoin.layers.tables import Tables
from conjoin.layers.view import View

KINDS: tuple[Kind, ...] = (
    Linear(),
    Conv1d(),
    Conv2d(),
    Conv3d(),
    ConvTranspose1d(),
    ConvTranspose2d(),
    ConvTranspose3d(),
    Embedding(),
)
"""Every kind of layer that siblings are looked for in."""

PRODUCTS: tuple[Kind, ...] = (*product.KINDS, *convolved.KINDS)
"""The kinds of product with a module's own Parameters."""

NORMS: tuple[Kind, ...] = (*NORMALIZATIONS, PReLU())
"""The kinds that follow wide layers and keep the number of channels."""

GATHERED: tuple[Kind, ...] = (Tables(),)
"""The kinds that layers on tensors of their own are merged as, where that is another one."""


def kind_of(layer: object, kinds: tuple[Kind, ...] = KINDS) -> Kind | None:
    """The kind that `layer` is of: that for the most specific class; None where it is of none.

    A view is of the kind that it was fused as, also where that is not among `kinds`; but for those
    that are not looked for among siblings, which are asked for by themselves.
    """
    if isinstance(layer, View):
        kind = layer.wide_layer.kind
        asked = kind.siblings or any(type(each) is type(kind) for each in kinds)
        return kind if asked else None
    classes = type(layer).__mro__
    return next((kind for cls in classes for kind in kinds if kind.layer is cls), None)


def held_weight(layer: nn.Module) -> Tensor | None:
    """The weight that a layer holds; to read one that it computes may change its state."""
    return layer.weight if isinstance(layer, View) else layer._parameters.get("weight")


def norm_of(layer: object) -> Norm | None:
    """The kind of a normalization; None where `layer` is none."""
    kind = kind_of(layer, NORMS)
    return kind if isinstance(kind, Norm) else None


def checked_kinds(kinds: object) -> tuple[Kind, ...]:
    """`kinds` as a tuple.

    Raises:
        TypeError: it is no tuple or list of kinds, or one of them lacks what a `Kind` must have.
        ValueError: it is empty, a dimension is out of range, or two kinds are for one class.
    """
    if not isinstance(kinds, (tuple, list)):
        raise TypeError(
            f"kinds is a tuple of kinds, not {type(kinds).__name__}. Pass those that conjoin knows "
            "and your own: (*conjoin.KINDS, MyKind())."
        )
    if not kinds:
        raise ValueError("kinds is empty. Leave it out to have all kinds that conjoin knows.")
    for kind in kinds:
        _check(kind)
    by_class: dict[type[nn.Module], Kind] = {}
    for kind in kinds:
        other = by_class.setdefault(kind.layer, kind)
        if other is not kind:
            raise ValueError(
                f"{type(other).__name__} and {type(kind).__name__} are both for "
                f"{kind.name}. Pass one of them."
            )
    return tuple(kinds)


def _check(kind: object) -> None:
    if isinstance(kind, type) and issubclass(kind, Kind):
        name = kind.__name__
        raise TypeError(f"{name} is a class where kinds has instances. Pass {name}().")
    if not isinstance(kind, Kind):
        given = kind.__name__ if isinstance(kind, type) else type(kind).__name__
        raise TypeError(
            f"kinds has instances of conjoin.Kind, not {given}. Write a subclass of conjoin.Kind "
            "for the layers that are to be merged, and pass an instance."
        )
    for attribute, expected, found in _mistaken(kind):
        raise TypeError(f"{type(kind).__name__}.{attribute} is to be {expected}; {found}.")
    dimensions = max(2, 1 - kind.output_dim)
    if kind.output_dim >= 0:
        raise ValueError(
            f"{type(kind).__name__}.output_dim is counted from the end of the output, such as -1, "
            f"not {kind.output_dim}."
        )
    if kind.weight_dim not in range(dimensions):
        raise ValueError(
            f"{type(kind).__name__}.weight_dim is a dimension of the weight, from 0 to "
            f"{dimensions - 1} where output_dim is {kind.output_dim}, not {kind.weight_dim}."
        )


def _mistaken(kind: Kind) -> Iterator[tuple[str, str, str]]:
    """The attributes of the wrong type: what is expected, and what was given."""
    layer, settings = getattr(kind, "layer", None), getattr(kind, "settings", None)
    if layer is None:
        yield "layer", "the class of the layers", "it is missing"
    elif not isinstance(layer, type) or not issubclass(layer, nn.Module) or layer is nn.Module:
        yield "layer", "the class of the layers, a subclass of torch.nn.Module", f"it is {layer!r}"
    if settings is None:
        yield "settings", "a tuple of attributes' names", "it is missing"
    elif not _are_names(settings):
        yield "settings", "a tuple of attributes' names, such as ('size',)", f"it is {settings!r}"
    for name in ("weight_dim", "output_dim"):
        if type(value := getattr(kind, name)) is not int:
            yield name, "an int", f"it is {value!r}"


def _are_names(settings: object) -> bool:
    return isinstance(settings, tuple) and all(isinstance(name, str) for name in settings)


__all__ = [
    "GATHERED",
    "KINDS",
    "NORMS",
    "PRODUCTS",
    "Kind",
    "Norm",
    "checked_kinds",
    "kind_of",
    "norm_of",
]
