"""Lays out tables and lists: for a terminal, wrapped to its columns, and for Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from tabulate import tabulate

# What the table keeps within, in characters. The layers take what the other columns leave.
_COLUMNS = 118
_WIDTHS_COLUMNS = 22
_OUTCOME_COLUMNS = 36
_LAYERS_COLUMNS_AT_LEAST = 24

# tabulate makes a column at least this much wider than its header.
_HEADER_PADDING = 2

HEADERS = ("kind", "layers", "groups", "widths", "launches, or why not")

Row = tuple[str, str, str, str, str]


def table(rows: Sequence[Row]) -> str:
    """A table for a terminal, its cells wrapped to keep within the columns."""
    kinds, names, groups, widths, outcomes = ([*column] for column in zip(*rows, strict=True))
    widths = [_wrap(text, _WIDTHS_COLUMNS, "+") for text in widths]
    outcomes = [fill(text, _OUTCOME_COLUMNS) for text in outcomes]
    others = zip((HEADERS[0], *HEADERS[2:]), (kinds, groups, widths, outcomes), strict=True)
    taken = sum(
        2 + max(len(header) + _HEADER_PADDING, *map(len, "\n".join(cells).splitlines()))
        for header, cells in others
    )
    names = [_wrap(text, max(_COLUMNS - taken, _LAYERS_COLUMNS_AT_LEAST), ".") for text in names]
    return tabulate(
        zip(kinds, names, groups, widths, outcomes, strict=True),
        HEADERS,
        disable_numparse=True,
        colalign=("left", "left", "right", "left", "left"),
    )


def github_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def listing(title: str, items: Sequence[tuple[str, str]]) -> str:
    """A titled list of names with a text each, wrapped."""
    wrapper = textwrap.TextWrapper(
        _COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join([title, *(wrapper.fill(f"{name}: {text}") for name, text in items)])


def fill(text: str, columns: int = _COLUMNS) -> str:
    """Wrap a sentence between its words."""
    return textwrap.fill(text, columns, break_on_hyphens=False)


def _wrap(text: str, columns: int, breaks: str) -> str:
    """Wrap names or a sum: between words, else after one of `breaks`, else inside braces."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if lines[-1] and len(lines[-1] + word.rstrip()) > columns:
            lines.append("")
        for piece in _pieces(word, columns, breaks):
            if lines[-1] and len(lines[-1] + piece.rstrip()) > columns:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _pieces(word: str, columns: int, breaks: str) -> list[str]:
    """The parts of a word that a line may end after."""
    if len(word.rstrip()) <= columns:
        return [word]
    parts = re.findall(rf"(?:{{[^}}]*}}|[^{breaks}])+[{breaks}]?|.", word)
    return [
        piece
        for part in parts
        for piece in ([part] if len(part) <= columns else re.findall(r"[^,]+,?|,", part))
    ]


def code(text: str) -> str:
    """A Markdown code span that is safe in a table."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def escape(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line of a table."""
    return re.sub(r"([\\`*_<|])", r"\\\1", " ".join(text.split()))
