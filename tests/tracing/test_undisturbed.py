"""A look at a model puts back what its code keeps, in whatever objects it keeps it."""

import argparse
import collections
import dataclasses
import types

import pytest
import torch
from torch import nn

import conjoin


class Slots:
    __slots__ = ("__hidden", "later", "n", "seen")

    def __init__(self):
        self.n, self.seen, self.__hidden = 0, [], 0

    def count(self):
        self.__hidden += 1
        self.later = self.n

    @property
    def hidden(self):
        return self.__hidden


class Both(Slots):
    """With attributes of its own beside the slots."""


@dataclasses.dataclass(slots=True)
class Record:
    n: int = 0
    seen: list = dataclasses.field(default_factory=list)


class Namespace(types.SimpleNamespace):
    """One of the user's own"""


def in_namespace(cls):
    return cls(n=0, seen=[])


KEPT = {
    "SimpleNamespace": lambda: in_namespace(types.SimpleNamespace),
    "argparse": lambda: in_namespace(argparse.Namespace),
    "own namespace": lambda: in_namespace(Namespace),
    "slots": Slots,
    "slots and attributes": Both,
    "dataclass with slots": Record,
}

ITEMS = {
    "UserDict": lambda: collections.UserDict(n=0),
    "ChainMap": lambda: collections.ChainMap({"n": 0}),
}


def keeps(kept, x):
    kept.n += 1
    kept.seen.append(x)
    if isinstance(kept, Slots):
        kept.count()


def keeps_items(kept, x):
    kept["n"] += 1
    kept["new"] = x


def described(kept):
    names = ("n", "seen", "hidden", "later", "data", "maps")
    return {name: str(getattr(kept, name)) for name in names if hasattr(kept, name)}


HELD = types.SimpleNamespace()
"""What code finds as a global."""


class Heads(nn.Module):
    def __init__(self, kept, keep):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.kept, self.keep = kept, keep

    def forward(self, x):
        self.keep(self.kept, x)
        return self.a(x), self.b(x)


class OfGlobal(Heads):
    def forward(self, x):
        self.keep(HELD.kept, x)
        return self.a(x), self.b(x)


@pytest.mark.parametrize("cls", [Heads, OfGlobal])
@pytest.mark.parametrize("look", [conjoin.optimize, conjoin.report])
@pytest.mark.parametrize("inputs", [None, (torch.ones(2, 4),)], ids=["traced", "observed"])
@pytest.mark.parametrize(
    ("make", "keep"),
    [*((make, keeps) for make in KEPT.values()), *((make, keeps_items) for make in ITEMS.values())],
    ids=[*KEPT, *ITEMS],
)
def test_what_is_kept_is_put_back(cls, look, inputs, make, keep):
    kept = make()
    HELD.kept = kept
    model = cls(None if cls is OfGlobal else kept, keep)
    before = described(kept)
    look(model, inputs)
    assert described(kept) == before
