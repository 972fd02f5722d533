"""`Report` and `Group`: what was found and saved, as a table, as Markdown, as JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from conjoin.graph.depth import Chain
from conjoin.graph.site import Untraced
from conjoin.launches import Launches
from conjoin.legality import Reason
from conjoin.memory import UNPREDICTED, Memory, in_words
from conjoin.policy.figures import Figures
from conjoin.reports.folding import fold
from conjoin.reports.layout import HEADERS, Row, code, escape, fill, github_table, listing, table

# From this many equal widths in a row, `4*64` is easier to read than `64+64+64+64`.
_WIDTHS_IN_A_ROW = 4

_TOTALS_HEADERS = ("pass", "kernel launches", "change")
_MODEL = "(the model itself)"

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

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Conv1d(8, 2, 1), torch.nn.Conv1d(8, 2, 3))
        >>> (group,) = conjoin.report(model).groups
        >>> group.kind, group.layers, group.widths, group.fused, group.reason.name
        ('Conv1d', ('0', '1'), (2, 2), False, 'DIFFERENT_SETTINGS')
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

    Example:
        >>> import json, torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> report = conjoin.report(model, (torch.randn(4, 8),))
        >>> report.launches.before.forward, report.launches.after.forward
        (2, 1)
        >>> json.loads(report.to_json())["groups"][0]["widths"]
        [2, 3]
    """

    groups: tuple[Group, ...]
    launches: Launches
    untraced: tuple[Untraced, ...]
    observed: bool
    memory: Memory = UNPREDICTED

    def __str__(self) -> str:
        """The report as a table of up to 118 columns, with its totals and advice."""
        parts = [fill(_headline(self))]
        if self.groups:
            parts.append(table([_row(line) for line in _lines(self.groups)]))
        if _counted(self.launches):
            parts.append(tabulate(_totals(self.launches), _TOTALS_HEADERS))
        parts += [fill(text) for text in _peaks(self.memory)]
        parts += [listing(title, items) for title, items in _sections(self)]
        parts += [fill(advice) for advice in _advice(self)]
        return "\n\n".join(parts)

    def to_json(self) -> str:
        """Write the report as JSON.

        Returns:
            An object with the report's fields in their order. Names are not folded. A ``reason``
            is null or an object with ``name`` and ``sentence``; a group's ``launches`` is null or
            an object with ``before`` and ``after``; its ``depth`` is a list of objects with the
            number of ``branches``, the ``operations`` and the ``layers`` behind the siblings; its
            ``figures`` are null or an object with the seconds ``apart``, as a ``whole`` and as
            ``chosen``, whether they were ``measured``, and whether they are those of siblings in
            ``lockstep``.
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
                (kind, code(layers), groups, code(widths), escape(outcome))
                for kind, layers, groups, widths, outcome in map(_row, _lines(self.groups))
            ]
            parts.append(github_table(HEADERS, rows))
        if _counted(self.launches):
            parts.append(github_table(_TOTALS_HEADERS, _totals(self.launches)))
        parts += _peaks(self.memory)
        for title, items in _sections(self):
            lines = [f"- {code(name)}: {escape(text)}" for name, text in items]
            parts.append("\n".join([title, "", *lines]))
        parts += _advice(self)
        return "\n\n".join(parts)


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


def _row(line: Sequence[Group]) -> Row:
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
    before, after = in_words(memory.before), in_words(memory.after)
    change = _percentage(memory.before, memory.after).replace("fewer", "less")
    peak = f"Predicted peak of the memory of a step: {before} -> {after} ({change})."
    return [peak, memory.warning] if memory.warning else [peak]


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


def _plural(number: int, noun: str) -> str:
    """A number with its noun."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{ending}"
