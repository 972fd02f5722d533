"""Makes one view a plain layer again, while its siblings stay merged."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from conjoin.layers.checks import TENSORS
from conjoin.layers.wide import WIDE, Sibling, like


class Parametrizations:
    """`view.parametrizations`: none, but `register_parametrization` asks for them first.

    It wants a plain layer, with a Parameter among its `_parameters`, so it gets one. Without
    `__set__`, and as it always raises, the attribute is what it is in any module.
    """

    def __get__(self, view: Sibling | None, owner: type[Sibling]) -> Any:
        asks = sys._getframe(1).f_back
        if view is not None and asks is not None:
            registers = asks.f_code is parametrize.register_parametrization.__code__
            if registers and asks.f_locals.get("tensor_name") in TENSORS:
                take_out(view)
        raise AttributeError("parametrizations")


def take_out(view: Sibling) -> nn.Module:
    """Releases a view because of something that somebody does to it alone."""
    warnings.warn(
        f"{view!r} is taken out of its wide layer by a change that concerns it alone. Its "
        "parameters are new objects: build the optimizer after this, or change it before "
        "conjoin.optimize.",
        stacklevel=3,
    )
    return release(view)


def release(view: Sibling) -> nn.Module:
    """Makes one view a plain layer again, with its own copy of its slice; the others stay.

    Returns:
        The same object, now of its own class.
    """
    wide = view.wide_layer
    wide.known.pop(view.conjoin_index, None)
    lent = [part for part in wide.handed_out.values() if part.conjoin_view is view]
    restored: dict[str, nn.Parameter | None] = {}
    for name, source in wide.named_parameters(recurse=False):
        if not wide.holds(name, view.conjoin_index):
            continue
        restored[name] = own = like(
            wide.part(name, source, view.conjoin_index).detach().clone(), source
        )
        if source.grad is not None:
            own.grad = wide.part(name, source.grad, view.conjoin_index).clone()
    del view.__dict__["conjoin_index"], view.__dict__["conjoin_leads"]
    # A dictionary of its own: somebody may be going through the view's modules right now.
    view.__dict__["_modules"] = {k: child for k, child in view._modules.items() if k != WIDE}
    layer: nn.Module = view
    layer.__class__ = view.conjoin_base
    layer.__dict__["_parameters"] = {**restored, **layer._parameters}
    for name in wide.running:
        held = layer._buffers.get(name)
        layer._buffers[name] = None if held is None else held.clone()
    for part in lent:
        part.bound()
    return layer
