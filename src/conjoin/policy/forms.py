"""Forms: the ways to run a group of layers as one or as several."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

Form = tuple[tuple[int, ...], ...]
"""The positions of layers, those that run as one together."""


def forms(widths: Sequence[int], names: Sequence[str]) -> Iterator[Form]:
    """Ways to run layers as one or several, from one wide layer to all by themselves.

    Each is as even as can be, with neighbours by width and name together; the order in which the
    layers are given decides nothing. None leaves a layer alone beside others that run as one: where
    a wider one does not pay, the rest of a few seldom does.

    Args:
        widths: the numbers of the layers' channels.
        names: their names.
    """
    return in_order(widths, ordered(widths, names))


def ordered(widths: Sequence[int], names: Sequence[str]) -> tuple[int, ...]:
    """The positions of layers by width and name."""
    return tuple(sorted(range(len(widths)), key=lambda i: (widths[i], _natural(names[i]))))


def in_order(widths: Sequence[int], order: Sequence[int]) -> Iterator[Form]:
    """`forms` of layers in this order."""
    known: set[Form] = set()
    for count in _counts(len(widths)):
        form = _cut(widths, order, count)
        alone = sum(len(run) == 1 for run in form)
        if form not in known and alone in (0, len(order)):
            known.add(form)
            yield form


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """A name as people sort it: with the numbers in it as numbers."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"([0-9]+)", name)
    ]


def _counts(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 11, 16, 23, ..., `most`: few, for any number of layers, and close."""
    counts = {round(2 ** (half / 2)) for half in range(2 * most.bit_length())}
    return sorted(count for count in {*counts, most} if count <= most)


def _cut(widths: Sequence[int], order: Sequence[int], count: int) -> Form:
    """Neighbours together, in about `count` runs of about one width; all alone for as many."""
    if count == len(order):
        return tuple((position,) for position in sorted(order))
    total, before = sum(widths), 0
    runs: dict[int, list[int]] = {}
    for position in order:
        middle = before + widths[position] / 2
        runs.setdefault(int(middle * count / total) if total else 0, []).append(position)
        before += widths[position]
    return tuple(sorted(tuple(sorted(run)) for run in runs.values()))
