"""Conversions such as `half()`: whether one concerns all siblings or only some."""

from __future__ import annotations

import inspect
import threading

from torch import nn

from conjoin.layers.wide import Wide


class Conversion(threading.local):
    """The conversion of a module, such as `half()`, that is going on."""

    fn: object = None
    modules: frozenset[int] = frozenset()

    def concerns_all(self, wide: Wide, fn: object) -> bool:
        """Whether `fn` is being applied to a module that encloses all siblings."""
        if self.fn is not fn:
            self.fn = fn
            self.modules = frozenset(map(id, _converted_module().modules()))
        # Going through the modules has shown each wide layer the one that encloses its siblings.
        enclosing = wide.enclosing and wide.enclosing()
        return enclosing is not None and id(enclosing) in self.modules


CONVERSION = Conversion()


def _converted_module() -> nn.Module:
    """The module on which the innermost chain of `_apply` began, which the call stack tells."""
    found: nn.Module | None = None
    frame = inspect.currentframe()
    while frame is not None and (found is None or frame.f_code.co_name == "_apply"):
        if frame.f_code.co_name == "_apply":
            found = frame.f_locals["self"]
        frame = frame.f_back
    assert found is not None  # It is called by the `_apply` of a view.
    return found
