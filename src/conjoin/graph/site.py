"""One call of a layer, however it was seen, and all that was seen of a model."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Site:
    """One call of one layer.

    Attributes:
        layer: the layer's qualified name.
        input: which tensor it read; equal for sites that read the very same tensor object, or
            what equal activations make of the very same tensor object.
        version: changes when that tensor is, or may have been, changed in place.
        modes: the modes that were on (gradients, autocast, inference), so far as known.
        object: which tensor object it read.
        activations: the names of the activations that made that object.
    """

    layer: str
    input: Hashable
    version: Hashable
    modes: Hashable = None
    object: Hashable = None
    activations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the first call of a layer that was seen read and gave.

    Attributes:
        input: the shape of what it read.
        output: the shape of what it gave.
        dtype: the type of the numbers that it read.
        passed_on: whether what it read gets a gradient in training.
    """

    input: tuple[int, ...]
    output: tuple[int, ...]
    dtype: torch.dtype
    passed_on: bool


@dataclass(frozen=True, slots=True)
class Untraced:
    """A part of the model that could not be looked into.

    Attributes:
        module: the module's qualified name; the empty string is the model itself.
        why: what stopped it, in one line.
    """

    module: str
    why: str


@dataclass(frozen=True, slots=True)
class Sightings:
    """What was seen of a model.

    Attributes:
        sites: the calls, in the order in which they happen.
        strided: for each layer whose output is read by something that depends on its strides,
            what that is. Such an output is handed out contiguous.
        untraced: what could not be looked into.
        listed: for each layer that is come across when the model's code goes through the
            parameters or modules of some module, the names of those modules.
        changed: the layers whose parameters are changed in place while the model runs.
        calls: for each module with children, the structures of its calls, and which of their
            tensors were always alike and how many dimensions they had, see
            `tracing/structures.py`.
        read: the layers whose parameters are read in another way than by calling the layer.
        shapes: what each layer read and gave, where it was run.
    """

    sites: tuple[Site, ...]
    strided: dict[str, str]
    untraced: tuple[Untraced, ...] = ()
    listed: Mapping[str, Collection[str]] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    calls: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    shapes: Mapping[str, Shapes] = field(default_factory=dict)
