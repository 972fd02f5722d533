"""The kinds of layer that conjoin knows, one file a kind, and the wide layer with its views."""

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
from conjoin.layers.norm import NORMS

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


def kind_of(layer: object, kinds: tuple[Kind, ...] = KINDS) -> Kind | None:
    """The kind that `layer` is of; None where it is of none."""
    return next((kind for kind in kinds if isinstance(layer, kind.layer)), None)


__all__ = ["KINDS", "NORMS", "Kind", "kind_of"]
