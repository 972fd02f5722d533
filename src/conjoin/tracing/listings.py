"""Which layers a forward comes across when it goes through parameters or modules.

`self.parameters()` and `self.modules()` of a module that holds all of a group's siblings give the
wide layer's. A forward that computes with what it finds there, a penalty on each norm, say, would
compute something else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from conjoin.layers import Kind, kind_of
from conjoin.reachable import words

LISTING = frozenset({"parameters", "named_parameters", "modules", "named_modules"})
"""The methods of a module that go through all that is in it."""

Named = Iterator[tuple[str, nn.Module]]


class Listings:
    """Notes the layers that are come across.

    Attributes:
        on: whether what happens now is noted.
        found: for each layer, the modules of which it was listed, by their qualified names.
    """

    def __init__(self, model: nn.Module, layers: Mapping[nn.Module, str]) -> None:
        """Instruments `model`, by attributes of its modules."""
        self.on = False
        self.found: dict[str, set[str]] = {}
        self._layers = layers
        for name, module in list(model.named_modules()):
            if module._modules:
                vars(module)["named_modules"] = functools.partial(
                    self._listed, name, module.named_modules
                )

    def _listed(
        self, root: str, listing: Callable[..., Named], memo: Any = None, *args: Any, **kwargs: Any
    ) -> Named:
        for name, module in listing(memo, *args, **kwargs):
            yield name, module
            # Only now it is known that more was wanted than the first one, such as its device.
            if memo is None and self.on and module in self._layers:
                self.found.setdefault(self._layers[module], set()).add(root)


def listed_by_code(model: nn.Module, kinds: tuple[Kind, ...]) -> dict[str, set[str]]:
    """What `Listings` finds in a run, as far as the code of the forwards tells it.

    Args:
        model: the model.
        kinds: the kinds of layer to look for.
    """
    found: dict[str, set[str]] = {}
    for root, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and LISTING.intersection(words(code)):
            for name, layer in module.named_modules(prefix=root):
                if kind_of(layer, kinds) is not None:
                    found.setdefault(name, set()).add(root)
    return found
