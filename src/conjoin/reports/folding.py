"""Writes many names of modules briefly and exactly: `blocks.{0..11}.attn.{q,k,v}`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

_Box = tuple[frozenset[str], ...]


def fold(names: Iterable[str]) -> str:
    """Write names briefly and exactly: ``blocks.{0..11}.attn.{q,k,v}``.

    Expanding every brace gives the names again, each once. Whole components of the dotted names
    are folded; three or more consecutive integers become a range. Names that are not a product of
    their components become several alternatives, parted by ``", "``. A name that holds a comma, a
    brace, a quote or white space, or is empty, is written as its ``repr``.

    Args:
        names: The names; one that occurs again is left out.

    Returns:
        The folded text; ``""`` for no names.
    """
    unique = list(dict.fromkeys(names))
    rank = {name: position for position, name in enumerate(unique)}
    special = {name for name in unique if not name or re.search(r"[{},'\"\s]", name)}
    texts = [(rank[name], repr(name)) for name in special]
    plain = [name for name in unique if name not in special]
    texts += [(rank[first], text) for first, text in _fold_plain(plain)]
    return ", ".join(text for _, text in sorted(texts))


def _fold_plain(names: Sequence[str]) -> list[tuple[str, str]]:
    """Fold names without special characters; with each text comes its first name."""
    paths = {name: tuple(name.split(".")) for name in names}
    first: dict[_Box, str] = {}
    for depth in sorted({len(path) for path in paths.values()}):
        boxes = {
            tuple(frozenset([part]) for part in path): name
            for name, path in paths.items()
            if len(path) == depth
        }
        first |= _merge_boxes(boxes, depth)
    seen = dict.fromkeys(part for path in paths.values() for part in path)
    order = {part: position for position, part in enumerate(seen)}
    return [
        (name, ".".join(_braces(sorted(parts, key=order.__getitem__)) for parts in box))
        for box, name in first.items()
    ]


def _merge_boxes(boxes: dict[_Box, str], depth: int) -> dict[_Box, str]:
    """Unite products that differ in one place only, until none do; each keeps its first name.

    Boxes are disjoint, so uniting two that agree everywhere else is exact.
    """
    before = 0
    while len(boxes) != before:
        before = len(boxes)
        for axis in reversed(range(depth)):
            alike: dict[tuple[_Box, _Box], list[_Box]] = {}
            for box in boxes:
                alike.setdefault((box[:axis], box[axis + 1 :]), []).append(box)
            boxes = {
                (*head, frozenset().union(*(box[axis] for box in some)), *tail): boxes[some[0]]
                for (head, tail), some in alike.items()
            }
    return boxes


def _braces(parts: Sequence[str]) -> str:
    """One component of a folded name: itself, or its alternatives with integers as ranges."""
    if len(parts) == 1:
        return parts[0]
    integers = sorted(int(part) for part in parts if _is_integer(part))
    texts: list[str] = []
    # In a run of consecutive integers, value minus position is constant.
    for _, run in itertools.groupby(enumerate(integers), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        texts += [f"{values[0]}..{values[-1]}"] if len(values) > 2 else map(str, values)
    texts += [part for part in parts if not _is_integer(part)]
    return "{" + ",".join(texts) + "}"


def _is_integer(part: str) -> bool:
    """Whether a component is an integer as Python writes it, so that a range gives it again."""
    return re.fullmatch(r"0|[1-9][0-9]*", part) is not None
