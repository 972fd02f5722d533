"""Finds, in each branch, the module that stands where another one stands in the first branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from conjoin.graph import elementwise


def twin_of(target: str, names: Sequence[str], index: int, modules: Mapping[str, nn.Module]) -> str:
    """The module of a branch that is what `target` is of the first one.

    Args:
        target: the name of a module without parameters.
        names: the names of a layer of each branch, which tell what the branches are called.
        index: the branch.
        modules: the modules by name.

    Returns:
        Its name; `target` where there is none, or where it does something else.
    """
    first, own = (names[i].split(".") if names else [] for i in (0, index))
    start = _common(first, own)
    end = _common(first[start:][::-1], own[start:][::-1])
    inner, path = first[: len(first) - end], target.split(".")
    if path[: len(inner)] != inner:
        return target
    name = ".".join([*own[: len(own) - end], *path[len(inner) :]])
    module, twin = modules[target], modules.get(name)
    same = type(twin) is type(module) and elementwise.is_plain(module)
    if twin is None or not same or not elementwise.is_plain(twin):
        return target
    alike = elementwise.settings(twin) == elementwise.settings(module)
    return name if alike and twin.training == module.training else target


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items two lists begin with in common."""
    pairs = list(zip(first, second, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
