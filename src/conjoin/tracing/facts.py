"""Facts that must hold at each call of a rewritten forward, and one function that tells of all.

In a step of training little of what is looked at here is in the processor's caches, and waiting
for memory takes longer than anything that is computed. So facts are not looked at where they cannot
have changed: CPython numbers the changes of dictionaries, and where none of these has changed since
its facts held, they hold. And all objects that are looked at are copied to a list first, which
counts one reference more to each: no such access waits for the one before.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._C._dynamo import guards

from conjoin.tracing.source import Names

dict_version: Callable[[dict[Any, Any]], int] | None = getattr(guards, "dict_version", None)
"""The number of the last change of a dictionary; Dynamo's own, so it may go."""

if (3, 13) <= sys.version_info < (3, 13, 1):  # It misses most changes of attributes: gh-125608.
    dict_version = None

UNSETTLED = -1
"""What no sum of numbers of changes is."""

RESTLESS = 8
"""How many calls in a row must have changed dictionaries before their facts are spelled out."""


@dataclass(frozen=True, slots=True)
class Fact:
    """An expression that must be true.

    Attributes:
        source: the expression.
        of: the mapping that it is about; None where it is about something else as well.
        reads: other objects that it looks at.
    """

    source: str
    of: Any = None
    reads: tuple[Any, ...] = ()


def function_of(facts: Iterable[Fact], names: Names, parameters: str = "") -> Callable[..., bool]:
    """A function that tells whether all facts hold, which those before make sense of.

    Args:
        facts: the facts.
        names: what they refer to.
        parameters: what else those without a mapping refer to, with which it is called.
    """
    facts = [*facts]
    looked_at = itertools.chain.from_iterable((*fact.reads, fact.of) for fact in facts)
    reads = {id(each): each for each in looked_at if each is not None}
    spelled = [Fact(f"[*{names.name(tuple(reads.values()))}]")] if reads else []
    numbered: list[Fact] = []
    for fact in facts:
        may_rely = dict_version is not None and type(fact.of) is dict and fact.of
        (numbered if may_rely else spelled).append(fact)
    if numbered and dict_version is not None:
        spelled.append(Fact(Unchanged(numbered, dict_version, names).source()))
    return _spelled(spelled, names, parameters)


class Unchanged:
    """Facts about dictionaries, which are looked at again where one of those has changed.

    Each number that is given to a change of a dictionary is larger than those before, so that no
    two states have one sum. Two calls in a row must find the same before it is relied on, which
    tells what changes at each: a counter in a module, the names of a script. That is spelled out.
    Since Python 3.12, where PyTorch does the counting, it misses how empty ones are filled.
    """

    def __init__(
        self, facts: Sequence[Fact], number: Callable[[dict[Any, Any]], int], names: Names
    ) -> None:
        self._facts, self._number, self._names = facts, number, names
        self._hold = _spelled(facts, names)
        self._dictionaries = [*{id(fact.of): fact.of for fact in facts}.values()]
        self._numbers = [UNSETTLED] * len(self._dictionaries)
        self._total = [UNSETTLED]
        self._restless: list[Callable[[], bool]] = []
        self._unrest = 0
        self._lock = threading.Lock()

    def source(self) -> str:
        """An expression that tells whether the facts hold."""
        held = (self._number, self._dictionaries, self._total, self._restless, self._look)
        number, dictionaries, total, restless, look = map(self._names.name, held)
        as_before = f"{total}[0] == sum(map({number}, {dictionaries}))"
        return f"({as_before} and (not {restless} or {restless}[0]()) or {look}())"

    def _look(self) -> bool:
        with self._lock:
            numbers = [*map(self._number, self._dictionaries)]  # Before it may change meanwhile.
            if not self._hold():
                return False
            both = zip(self._dictionaries, numbers, self._numbers, strict=True)
            changed = {id(dictionary) for dictionary, now, before in both if now != before}
            settled = not changed and all(self._dictionaries)
            self._total[0] = sum(numbers) if settled else UNSETTLED
            self._numbers = numbers
            self._unrest = self._unrest + 1 if changed else 0
            if self._unrest > RESTLESS:
                self._spell_out(changed)
            return True

    def _spell_out(self, changed: set[int]) -> None:
        calm = [each for each in self._dictionaries if id(each) not in changed]
        self._dictionaries[:] = calm
        self._numbers = [UNSETTLED] * len(calm)
        kept = {*map(id, calm)}
        self._restless[:] = [
            _spelled([f for f in self._facts if id(f.of) not in kept], self._names)
        ]


def _spelled(facts: Iterable[Fact], names: Names, parameters: str = "") -> Callable[..., bool]:
    """A function that looks at each of the facts."""
    lines = "".join(f"            and {each}\n" for each in dict.fromkeys(f.source for f in facts))
    source = (
        f"def holds({parameters}):\n    try:\n        return (\n            True\n"
        f"{lines}        )\n    except (KeyError, AttributeError, ValueError):\n"
        "        return False\n"
    )
    return names.define(source, "holds")
