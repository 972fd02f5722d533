"""A named model: how to build it, and what to call it with."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2


@dataclasses.dataclass(frozen=True)
class Specimen:
    """A model at a small size, with random weights, in float64.

    Attributes:
        build: gives the model; called under a fixed seed.
        args: gives the positional arguments of a call; a batch of at least two.
        kwargs: gives the keyword arguments.
        fuses: whether the model has siblings that can be merged.
        package: what must be installed to build it.
    """

    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]] = tuple
    kwargs: Callable[[], dict[str, Any]] = dict
    fuses: bool = True
    package: str = "torch"

    def model(self) -> nn.Module:
        """The model: the same weights each time, none of them constant."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double()
            stir(model)
        return model

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments: the same values each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.args(), self.kwargs()


def public(
    path: str,
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]],
    *args: Any,
    fuses: bool = True,
    **settings: Any,
) -> Specimen:
    """A model of a package, which is imported when the model is built.

    Args:
        path: the model's class, or a function that makes it, as `package.module:name`.
        inputs: gives the arguments of a call: a tuple, or a dict of keyword arguments.
        args: what makes the model.
        fuses: whether it has siblings that can be merged.
        settings: what makes the model, by keyword.
    """

    def build() -> nn.Module:
        return named(path)(*args, **settings)

    return specimen(build, inputs, fuses=fuses, package=path.split(".")[0].split(":")[0])


def named(path: str) -> Any:
    """What a package calls by this name, written as `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def specimen(
    build: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]],
    *,
    package: str,
    fuses: bool = True,
) -> Specimen:
    """A model that a function builds with the package."""

    def args() -> tuple[Any, ...]:
        given = inputs()
        return given if isinstance(given, tuple) else ()

    def kwargs() -> dict[str, Any]:
        given = inputs()
        return given if isinstance(given, dict) else {}

    return Specimen(build, args, kwargs, fuses, package)


def stir(model: nn.Module) -> None:
    """Adds noise to constant parameters, so that nothing is multiplied by zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter == parameter.flatten()[:1].sum()).all():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def randn(*shape: int) -> Tensor:
    """Random values in float64 for a batch."""
    return torch.randn(BATCH, *shape, dtype=torch.float64)


def image(size: int, channels: int = 3) -> Tensor:
    """A batch of square images."""
    return randn(channels, size, size)


def tokens(length: int = 6, vocabulary: int = 40) -> Tensor:
    """A batch of random token numbers, away from the special ones at the start."""
    return torch.randint(4, vocabulary, (BATCH, length))
