"""A rewritten graph as a Python function, and as source to be bound to the modules of a region."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _format_target

from conjoin.tracing.quick import CALL, Written, restoring_mode, storing
from conjoin.tracing.source import Names

CALLED = re.compile(r'(?<= = )(?:getattr\()*self(?:\.\w+|, "[^"]*"\))+(?=\()')
"""How torch.fx writes what it calls of the region, `getattr(self.layers, "0")` for one."""


def compiled(
    graph: fx.Graph, stored: tuple[tuple[str, str], ...]
) -> tuple[Callable[..., Any], Written]:
    """The graph as a function of the region and its arguments, and as source to be bound.

    Args:
        graph: the graph.
        stored: paths of modules, and names of attributes, whose values it gives beside the output.
    """
    code = graph.python_code("self")
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    called = tuple((f"{CALL}{number}", target) for number, target in enumerate(targets))
    restores = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    namespace: dict[str, Any] = dict(code.globals)
    written = Written(
        _calling(code.src, {at: name for name, at in called}), namespace, called, restores, stored
    )
    source = _calling(code.src, {target: _child(target) for target in targets})
    function = Names(namespace).define(source, "forward")
    if restores:
        function = restoring_mode(function)
    if stored:
        function = storing(function, stored)
    function.__conjoin_source__ = source  # type: ignore[attr-defined]
    return function, written


def _calling(source: str, expressions: Mapping[str, str]) -> str:
    """Source with expressions of its own for what it calls of the region."""
    written = {_format_target("self", target): each for target, each in expressions.items()}
    return CALLED.sub(lambda found: written.get(found[0], found[0]), source)


def _child(target: str) -> str:
    """What reads a module from the region, past `nn.Module.__getattr__`, which is slow Python."""
    return "self" + "".join(f"._modules[{name!r}]" for name in target.split("."))
