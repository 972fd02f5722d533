"""Goes through the modules of a model, past its wide layers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from conjoin.layers.wide import Wide


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What `named_modules` gives, in the same order, but for wide layers; and much faster.

    PyTorch hands each module on through all those that it is in, and a view looks there whether its
    wide layer is to be listed.
    """
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        children = [*module._modules.items()]
        pending += [
            (prefix + key, child)
            for key, child in reversed(children)
            if child is not None and not isinstance(child, Wide)
        ]
