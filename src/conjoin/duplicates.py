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
    memo = {} if memo is None else memo
    kept = memo.setdefault(id(memo), [])  # Where `copy` keeps alive what it knows by its id.
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) in EMPTY and not value and name in OF_MODULES:
                memo[id(value)] = type(value)()
                kept.append(value)
    return copy.deepcopy(model, memo)
