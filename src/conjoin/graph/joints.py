"""Joints: what joins tensors to one, and which place in it each of them gets.

cat(x_0, ..., x_{n-1}, dim)        stack(x_0, ..., x_{n-1}, dim)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

CATS: frozenset[Any] = frozenset({torch.cat, torch.concat, torch.concatenate})
"""`torch.cat` in all its spellings."""


def is_joint(node: fx.Node) -> bool:
    """Whether a node joins tensors."""
    return node.op == "call_function" and node.target in (*CATS, torch.stack)


def joined(joint: fx.Node) -> tuple[list[fx.Node], object]:
    """What a joint joins, and along which dimension; nothing where that is not plain to see."""
    given = dict(zip(("tensors", "dim"), joint.args, strict=False)) | joint.kwargs
    parts, dim = given.pop("tensors", ()), given.pop("dim", given.pop("axis", 0))
    if given or not isinstance(parts, (list, tuple)):
        return [], dim
    found = [part for part in parts if isinstance(part, fx.Node)]
    return (found if len(found) == len(parts) else []), dim


def place(node: fx.Node) -> tuple[fx.Node, int] | tuple[()]:
    """The joint that a branch ends in, and which of its tensors the branch is.

    Branches that end in none come before all others.
    """
    while len(node.users) == 1:
        user = next(iter(node.users))
        if is_joint(user):
            parts, _ = joined(user)
            return (user, parts.index(node)) if node in parts else ()
        node = user
    return ()
