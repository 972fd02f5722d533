"""What was found, what became of it and what it saves: as a table, as Markdown, as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from conjoin.graph.depth import Chain
from conjoin.graph.site import Untraced
from conjoin.launches import Launches
from conjoin.legality import Reason
from conjoin.memory import UNPREDICTED, Memory, told
from conjoin.policy.cost import Figures

# What the table keeps within, in characters. The layers take what the other columns leave.
_COLUMNS = 118
_WIDTHS_COLUMNS = 22
_OUTCOME_COLUMNS = 36
_LAYERS_COLUMNS_AT_LEAST = 24

# tabulate makes a column at least this much wider than its header.
_HEADER_PADDING = 2

# From this many equal widths in a row, `4*64` is easier to read than `64+64+64+64`.
_WIDTHS_IN_A_ROW = 4

_HEADERS = ("kind", "layers", "groups", "widths", "launches, or why not")
_TOTALS_HEADERS = ("pass", "kernel launches", "change")
_MODEL = "(the model itself)"

_Box = tuple[frozenset[str], ...]
_Row = tuple[str, str, str, str, str]
_Section = tuple[str, list[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that read the same tensor.

    Attributes:
        kind: The layers' class, such as ``"Linear"``.
        layers: Their qualified names in the original model.
        fused: Whether they run as one wide layer.
        reason: Why not; None where they do, and where no rule but the cost is against it.
        detail: The values behind the reason.
        widths: The number of output features or channels of each layer.
        launches: Kernel launches of this group's forward before and after, all of ``depth``
            included; None where not counted.
        depth: What else runs at once, for each run of branches that go on alike; empty where none
            do, and where nothing was counted.
        figures: What it takes by itself and merged, where that decided; estimates, or measured.
    """

    kind: str
    layers: tuple[str, ...]
    fused: bool
    reason: Reason | None
    detail: str
    widths: tuple[int, ...]
    launches: tuple[int, int] | None
    depth: tuple[Chain, ...] = ()
    figures: Figures | None = None


@dataclass(frozen=True)
class Report:
    """The account of every set of sibling layers that was found.

    ``str(report)`` is a table for a terminal.

    Attributes:
        groups: One record for each set of siblings, in the model's order.
        launches: Kernel launches of one step, with None for what was not counted.
        untraced: The modules that could not be traced.
        observed: Whether example inputs were given, so that a run of the model was looked at too.
        memory: The predicted peak of the memory of one step, with None where it was not predicted.
    """

    groups: tuple[Group, ...]
    launches: Launches
    untraced: tuple[Untraced, ...]
    observed: bool
    memory: Memory = UNPREDICTED

    def __str__(self) -> str:
        """The report as a table of up to 118 columns, with its totals and advice."""
        parts = [_fill(_headline(self))]
        if self.groups:
            parts.append(_table([_row(line) for line in _lines(self.groups)]))
        if _counted(self.launches):
            parts.append(tabulate(_totals(self.launches), _TOTALS_HEADERS))
        parts += [_fill(text) for text in _peaks(self.memory)]
        parts += [_listing(title, items) for title, items in _sections(self)]
        parts += [_fill(advice) for advice in _advice(self)]
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """Write the report as JSON.

        Returns:
            An object with the report's fields in their order. Names are not folded. A ``reason``
            is null or an object with ``name`` and ``sentence``; a group's ``launches`` is null or
            an object with ``before`` and ``after``; its ``depth`` is a list of objects with the
            number of ``branches``, the ``operations`` and the ``layers`` behind the siblings; its
            ``figures`` are null or an object with the seconds ``apart``, as a ``whole`` and as
            ``chosen``, and whether they were ``measured``.
        """
        groups = [
            {
                "kind": group.kind,
                "layers": group.layers,
                "fused": group.fused,
                "reason": group.reason
                and {"name": group.reason.name, "sentence": group.reason.value},
                "detail": group.detail,
                "widths": group.widths,
                "launches": group.launches
                and {"before": group.launches[0], "after": group.launches[1]},
                "depth": [dataclasses.asdict(chain) for chain in group.depth],
                "figures": group.figures and dataclasses.asdict(group.figures),
            }
            for group in self.groups
        ]
        content = {
            "groups": groups,
            "launches": dataclasses.asdict(self.launches),
            "untraced": [dataclasses.asdict(untraced) for untraced in self.untraced],
            "observed": self.observed,
            "memory": dataclasses.asdict(self.memory),
        }
        return json.dumps(content, indent=2, ensure_ascii=False)

    def to_markdown(self) -> str:
        """Write the report as Markdown with tables as GitHub shows them.

        Returns:
            The same content as ``str(report)``, with names in backticks.
        """
        parts = [_headline(self)]
        if self.groups:
            rows = [
                (kind, _code(layers), groups, _code(widths), _escape(outcome))
                for kind, layers, groups, widths, outcome in map(_row, _lines(self.groups))
            ]
            parts.append(_github_table(_HEADERS, rows))
        if _counted(self.launches):
            parts.append(_github_table(_TOTALS_HEADERS, _totals(self.launches)))
        parts += _peaks(self.memory)
        for title, items in _sections(self):
            lines = [f"- {_code(name)}: {_escape(text)}" for name, text in items]
            parts.append("\n".join([title, "", *lines]))
        parts += _advice(self)
        return "\n\n".join(parts)


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


def _lines(groups: Sequence[Group]) -> list[list[Group]]:
    """Gather groups that repeat over numbered blocks and are equal but for the numbers."""
    lines: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        names = tuple(re.sub(r"(?<![^.])[0-9]+(?![^.])", "#", name) for name in group.layers)
        # A detail names its own layers; that alone does not make two groups different.
        detail = group.detail
        for position, name in enumerate(group.layers):
            detail = re.sub(rf"(?<![\w.]){re.escape(name)}(?![\w.])", f"<{position}>", detail)
        depth = tuple((chain.branches, chain.operations) for chain in group.depth)
        same = (group.kind, group.fused, group.reason, group.widths, group.launches, depth)
        lines.setdefault((*same, names, detail), []).append(group)
    return list(lines.values())


def _row(line: Sequence[Group]) -> _Row:
    """The cells of one line: kind, layers, number of groups, widths, and what became of it."""
    group = line[0]
    names = fold(name for each in line for name in each.layers)
    widths = _join_widths(group.widths)
    if group.fused:
        widths += f" -> {sum(group.widths)}"
    return group.kind, names, str(len(line)), widths, _outcome(line)


def _outcome(line: Sequence[Group]) -> str:
    """The launches of the line's groups together, or why they are left as they are."""
    group = line[0]
    # The groups of one line differ in their names only, and so may their details.
    detail = group.detail if len({each.detail for each in line}) == 1 else f"e.g. {group.detail}"
    if not group.fused:
        sentence = _sentence(group.reason)[0] if group.reason else "Left as it is."
        return f"{sentence} ({detail})" if detail else sentence
    if group.launches is None:
        return f"fused ({detail})" if detail else "fused"
    before, after = (number * len(line) for number in group.launches)
    counts = f"{before} -> {after} ({detail})" if detail else f"{before} -> {after}"
    return "; ".join([counts, *map(_chain, group.depth)])


def _chain(chain: Chain) -> str:
    """How far some branches go on alike: ``3 branches: Conv2d, BatchNorm2d, ReLU``."""
    return f"{_plural(chain.branches, 'branch')}: {', '.join(chain.operations)}"


def _sentence(reason: Reason) -> tuple[str, str]:
    """A reason's two sentences: what is in the way, and the remedy."""
    what, _, remedy = reason.value.partition(". ")
    return f"{what}.", remedy


def _join_widths(widths: Sequence[int]) -> str:
    """Widths as a sum, with many equal ones in a row as a product: ``5*320+64``."""
    terms: list[str] = []
    for width, run in itertools.groupby(widths):
        times = len(list(run))
        terms += [f"{times}*{width}"] if times >= _WIDTHS_IN_A_ROW else [str(width)] * times
    return "+".join(terms)


def _headline(report: Report) -> str:
    """How many groups there are and what became of them."""
    if not report.groups:
        return "No sibling layers found: no two layers of a kind that can merge read one tensor."
    layers = sum(len(group.layers) for group in report.groups)
    fused = sum(group.fused for group in report.groups)
    left = len(report.groups) - fused
    behind = sum(len(chain.layers) for group in report.groups for chain in group.depth)
    all_layers = f"{layers} layers, {behind} more behind them" if behind else f"{layers} layers"
    found = f"{_plural(len(report.groups), 'group')} of sibling layers ({all_layers})"
    outcomes = [f"{fused} fused"] if fused else []
    outcomes += [f"{left} left as {'it is' if left == 1 else 'they are'}"] if left else []
    return f"{found}: {', '.join(outcomes)}."


def _counted(launches: Launches) -> bool:
    """Whether there is any number of launches to show."""
    return launches.before.forward is not None


def _totals(launches: Launches) -> list[tuple[str, str, str]]:
    """The launches of a whole step, a row for each pass."""
    before, after = launches.before, launches.after
    return [
        ("forward", *_change(before.forward, after.forward)),
        ("backward", *_change(before.backward, after.backward)),
    ]


def _peaks(memory: Memory) -> list[str]:
    """The predicted peaks of memory, in a sentence, where there are any."""
    if memory.before is None or memory.after is None:
        return []
    before, after = told(memory.before), told(memory.after)
    change = _percentage(memory.before, memory.after).replace("fewer", "less")
    return [f"Predicted peak of the memory of a step: {before} -> {after} ({change})."]


def _change(before: int | None, after: int | None) -> tuple[str, str]:
    """Launches before and after, and by how much they fell or rose."""
    if before is None or after is None:
        return "not counted", ""
    return f"{before} -> {after}", _percentage(before, after)


def _percentage(before: int, after: int) -> str:
    """By how much a number fell or rose, in words."""
    if before == after:
        return "unchanged"
    if before == 0:
        return f"{after} more"
    return f"{abs(before - after) / before:.1%} {'fewer' if after < before else 'more'}"


def _sections(report: Report) -> list[_Section]:
    """The lists below the table: each a title, and names with a text."""
    sections: list[_Section] = []
    refused: dict[Reason, list[str]] = {}
    for group in report.groups:
        if group.reason:
            refused.setdefault(group.reason, []).extend(group.layers)
    if refused:
        items = [(fold(names), _sentence(reason)[1]) for reason, names in refused.items()]
        sections.append(("What would let the others merge:", items))
    stopped: dict[str, list[str]] = {}
    for untraced in report.untraced:
        stopped.setdefault(untraced.why, []).append(untraced.module)
    if stopped:
        title = "Could not be traced" + (
            ", and was looked at in a run of the example inputs:" if report.observed else ":"
        )
        items = [
            (
                ", ".join(filter(None, [_MODEL if "" in names else "", fold(filter(None, names))])),
                why,
            )
            for why, names in stopped.items()
        ]
        sections.append((title, items))
    return sections


def _advice(report: Report) -> list[str]:
    """What the reader can do to have more looked at or counted."""
    if report.observed:
        return []
    gains = ["count launches"]
    gains += ["look into what could not be traced"] if report.untraced else []
    how = "example_inputs=, or --input on the command line"
    return [f"Give example inputs ({how}) to {' and to '.join(gains)}."]


def _table(rows: Sequence[_Row]) -> str:
    """A table for a terminal, its cells wrapped to keep within the columns."""
    kinds, names, groups, widths, outcomes = ([*column] for column in zip(*rows, strict=True))
    widths = [_wrap(text, _WIDTHS_COLUMNS, "+") for text in widths]
    outcomes = [_fill(text, _OUTCOME_COLUMNS) for text in outcomes]
    others = zip((_HEADERS[0], *_HEADERS[2:]), (kinds, groups, widths, outcomes), strict=True)
    taken = sum(
        2 + max(len(header) + _HEADER_PADDING, *map(len, "\n".join(cells).splitlines()))
        for header, cells in others
    )
    names = [_wrap(text, max(_COLUMNS - taken, _LAYERS_COLUMNS_AT_LEAST), ".") for text in names]
    return tabulate(
        zip(kinds, names, groups, widths, outcomes, strict=True),
        _HEADERS,
        disable_numparse=True,
        colalign=("left", "left", "right", "left", "left"),
    )


def _github_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in GitHub's Markdown."""
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _listing(title: str, items: Sequence[tuple[str, str]]) -> str:
    """A titled list of names with a text each, wrapped."""
    wrapper = textwrap.TextWrapper(
        _COLUMNS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
    return "\n".join([title, *(wrapper.fill(f"{name}: {text}") for name, text in items)])


def _fill(text: str, columns: int = _COLUMNS) -> str:
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


def _code(text: str) -> str:
    """A Markdown code span that is safe in a table."""
    return f"`{text}`".replace("|", "\\|") if text else ""


def _escape(text: str) -> str:
    """Plain text that Markdown shows as it is, on one line of a table."""
    return re.sub(r"([\\`*_<|])", r"\\\1", " ".join(text.split()))


def _plural(number: int, noun: str) -> str:
    """A number with its noun."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"
