"""Source that refers to values by names, as functions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType
from typing import Any, cast


class Names(dict[str, Any]):
    """Values that source refers to, by the names that it has for them."""

    def __init__(self, held: Mapping[str, Any] = MappingProxyType({})) -> None:
        """With what there is by other names."""
        super().__init__(held)
        self._names: dict[int, str] = {}

    def name(self, value: Any) -> str:
        """A name for a value, one for each object."""
        name = self._names.setdefault(id(value), f"_{len(self._names)}")
        self[name] = value
        return name

    def define(self, source: str, name: str) -> Callable[..., Any]:
        """What `source` defines by a name."""
        held = dict(self)  # Python has a quick way to globals in a dict, and not in a subclass.
        exec(code(source), held)
        return cast("Callable[..., Any]", held.pop(name))


@functools.lru_cache
def code(source: str) -> CodeType:
    """Source as code, which like modules have in common."""
    return compile(source, "<conjoin>", "exec")
