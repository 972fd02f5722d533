"""Modules of a program whose calls must stay calls: `preserve_module_call_signature`.

`torch.export.unflatten` makes modules of them again, which read and give what the signature names.
So nothing is merged across their borders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallSignature

from conjoin.programs.raised import within


def preserved(program: ExportedProgram) -> Mapping[str, ModuleCallSignature]:
    """The signatures that are to stay, by the names of the modules; the program's own is none."""
    entries = program.module_call_graph
    return {e.fqn: e.signature for e in entries if e.fqn and e.signature is not None}


def across(program: ExportedProgram, groups: Iterable[list[str]]) -> Iterator[str]:
    """The layers that were merged across a border with more that have none between them.

    Args:
        program: the program.
        groups: the names of the layers that were merged in the raised graph, of each wide layer.
    """
    borders = preserved(program)
    for names in groups if borders else ():
        homes = [_home(within(name), borders) for name in names]
        [(most, _)] = Counter(homes).most_common(1)
        yield from (name for name, home in zip(names, homes, strict=True) if home != most)


def _home(name: str, borders: Iterable[str]) -> str:
    """The innermost module around a layer, or the layer itself, that has a border or holds one."""
    path = name.split(".")
    around = [".".join(path[:end]) for end in range(len(path), 0, -1)]
    held = (
        each for each in around if any(f"{border}.".startswith(f"{each}.") for border in borders)
    )
    return next(held, "")


def missing(program: ExportedProgram, graph: fx.Graph) -> list[str]:
    """The modules whose signatures name values that a graph has no more."""
    there = {node.name for node in graph.nodes}
    found: list[str] = []
    for border, signature in preserved(program).items():
        arguments = (*signature.inputs, *signature.outputs)
        names = {getattr(argument, "name", None) for argument in arguments}
        if not names - {None} <= there:
            found.append(border)
    return found
