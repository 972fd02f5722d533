"""`Proxy`: what stands for a tensor while a forward is traced."""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import fx

INNARDS = frozenset({"node", "tracer", "root", "attr", "_node"})
"""What a proxy has and a tensor has not."""


class UnsoundError(BaseException):
    """The trace would not be the original forward on every call.

    Not an `Exception`, so that no code that runs during a trace carries on after it.
    """


def unpack(values: Any, count: int) -> tuple[Any, ...]:
    """What `a, b = values` binds, for a `count` of names.

    Raises:
        ValueError: there are more or fewer values.
    """
    found = tuple(values)
    if len(found) < count:
        raise ValueError(f"not enough values to unpack (expected {count}, got {len(found)})")
    if len(found) > count:
        raise ValueError(f"too many values to unpack (expected {count})")
    return found


class Proxy(fx.Proxy):
    """A proxy that takes no part in what only a value could answer."""

    def _refuse(self, *args: object) -> NoReturn:
        raise UnsoundError("Python looks at the value of a tensor")

    __hash__ = __format__ = __str__ = __repr__ = __bool__ = __index__ = _refuse
    __int__ = __float__ = __complex__ = __len__ = __contains__ = __delitem__ = _refuse

    def __iter__(self) -> Iterator[fx.Proxy]:
        """As many items as there are names for them; the graph checks that there are no more."""
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is not None:
            for step in dis.get_instructions(caller.f_code):
                if step.offset == caller.f_lasti and step.opname == "UNPACK_SEQUENCE":
                    items = self.tracer.create_proxy("call_function", unpack, (self, step.arg), {})
                    return iter([items[i] for i in range(step.argval)])  # type: ignore[index]
        found = self.items()
        return iter(self.tracer.iter(self) if found is None else found)

    def items(self) -> list[fx.Proxy] | None:
        """What there is in a value; None where that is not known."""
        return None

    def __setattr__(self, name: str, value: object) -> None:
        """Only what a proxy itself consists of; a forward that assigns `x.data` is refused."""
        if name not in ("tracer", "node", "__dict__") and "node" in vars(self):
            raise UnsoundError(f"it assigns the attribute {name} of a tensor")
        super().__setattr__(name, value)


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method of proxies that records an operator which changes its first argument."""

    def method(self: Proxy, *operands: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *operands), {})

    return method


for _name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split():
    setattr(Proxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))
setattr(Proxy, "__setitem__", _recorded(operator.setitem))  # noqa: B010 - It is no attribute to mypy.
