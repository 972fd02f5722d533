"""Copies models as `copy.deepcopy` does, without taking apart all that is empty."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

from conjoin.reachable import OF_MODULES

Module = TypeVar("Module", bound=nn.Module)

EMPTY = (OrderedDict, dict, set)
"""Types of what every module has a dozen of, for hooks and the like, mostly with nothing in."""


def deepcopy(model: Module, memo: dict[int, Any] | None = None) -> Module:
    """What `copy.deepcopy` gives.

    Python takes an `OrderedDict` or a set apart to copy it, also where nothing is in it. So another
    one is made of each of these beforehand, which takes half as long in all.

    Args:
        model: the model.
        memo: as for `copy.deepcopy`: what is to stand for objects in the copy, by their ids.
    """
    given = {} if memo is None else memo
    empty = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if type(value) in EMPTY and not value and name in OF_MODULES
    ]
    made = copy.deepcopy(model, given | {id(value): type(value)() for value in empty})
    # Code of the model's own, which runs for a copy, may have put something in.
    return copy.deepcopy(model, given) if any(empty) else made
