"""Joints: `cat` and `stack`, and which place in one each branch has.

cat(x_0, ..., x_{n-1}, dim)        stack(x_0, ..., x_{n-1}, dim)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from conjoin.graph import edit
from conjoin.graph.bundles import batched

CATS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
"""`torch.cat` in all its spellings."""


STACKS: frozenset[Any] = frozenset({torch.stack, batched})
"""What stacks tensors."""


def is_joint(node: fx.Node) -> bool:
    """Whether a node joins tensors."""
    return node.op == "call_function" and node.target in CATS | STACKS


def joined(joint: fx.Node) -> tuple[list[fx.Node], object]:
    """What a joint joins, and along which dimension; nothing where that is not plain to see."""
    if joint.target is batched:
        return list(joint.all_input_nodes), 0
    given = edit.arguments(joint, ("tensors", "dim"))
    parts, dim = given.pop("tensors", ()), given.pop("dim", given.pop("axis", 0))
    if given or not isinstance(parts, (list, tuple)):
        return [], dim
    found = [part for part in parts if isinstance(part, fx.Node)]
    return (found if len(found) == len(parts) else []), dim


Place = tuple[fx.Node, int] | tuple[()]
"""A joint, and which of its tensors a branch is; empty, and before all others, without a joint."""


def places(nodes: Sequence[fx.Node]) -> list[Place]:
    """Where each branch that begins with a node ends, as long as one node reads it at a time."""
    known: dict[fx.Node, Place] = {}
    for start in nodes:
        node, path = start, [start]
        while node not in known and (user := _only_reader(node)) is not None:
            if is_joint(user):
                parts, _ = joined(user)
                known[node] = (user, parts.index(node)) if node in parts else ()
            else:
                node = user
                path.append(node)
        found = known.get(node, ())
        known.update(dict.fromkeys(path, found))
    return [known[node] for node in nodes]


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
