"""Notes which layers a forward meets when it goes through parameters or modules.

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
from conjoin.layers.owner import raw_parameters
from conjoin.layers.product import SUFFIX
from conjoin.reachable import words

LISTING = frozenset({"parameters", "named_parameters", "modules"})
"""The methods of a module that go through all that is in it.

`named_modules` is not among them: models ask in that way for hooks and types, and the wide layer
has none that they look for.
"""


class Listings:
    """Notes the layers that are come across.

    Attributes:
        on: whether what happens now is noted.
        found: for each layer, the modules of which it was listed, by their qualified names.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[nn.Module, str],
        raw: Mapping[str, nn.Parameter],
    ) -> None:
        """Instruments `model`, by attributes of its modules.

        Args:
            model: the model.
            layers: its layers, and their names.
            raw: Parameters of its own modules, by the names of the layers that they would become.
        """
        self.on = False
        self.found: dict[str, set[str]] = {}
        self._names = {id(layer): name for layer, name in layers.items()}
        for layer, name in layers.items():
            self._names.update({id(p): name for p in layer._parameters.values() if p is not None})
        self._names |= {id(parameter): name for name, parameter in raw.items()}
        for root, module in model.named_modules():
            if module._modules:
                for method in ("named_parameters", "modules"):
                    listing = functools.partial(self._listed, root, getattr(module, method))
                    vars(module)[method] = listing

    def _listed(
        self, root: str, listing: Callable[..., Iterator[Any]], *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        for found in listing(*args, **kwargs):
            yield found
            # Only now it is known that more was wanted than the first one, such as its device.
            layer = self._names.get(id(found[1] if isinstance(found, tuple) else found))
            if self.on and layer is not None:
                self.found.setdefault(layer, set()).add(root)


def listed_by_code(model: nn.Module, kinds: tuple[Kind, ...]) -> dict[str, set[str]]:
    """What `Listings` finds in a run, as far as the code of the forwards tells it.

    Args:
        model: the model.
        kinds: the kinds of layer to look for.
    """
    found: dict[str, set[str]] = {}
    for root, module in model.named_modules():
        code = getattr(getattr(type(module), "forward", None), "__code__", None)
        if code is not None and LISTING.intersection(words(code)):
            for name, layer in module.named_modules(prefix=root):
                if kind_of(layer, kinds) is not None:
                    found.setdefault(name, set()).add(root)
            for name, _ in raw_parameters(module):
                found.setdefault(f"{root}.{name}{SUFFIX}".lstrip("."), set()).add(root)
    return found
