"""Joints: `cat` and `stack`, and which place in one each branch has.

cat(x_0, ..., x_{n-1}, dim)        stack(x_0, ..., x_{n-1}, dim)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from conjoin.graph import edit, functional, strides
from conjoin.graph.bundles import batched
from conjoin.graph.meta import EXAMPLE

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


Steps: TypeAlias = list[tuple[str, tuple[Any, ...]]]
"""Methods of a tensor, called in turn, and their arguments."""

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


def steps(joint: fx.Node, along: int | None) -> Steps:
    """The methods that make what a joint gives of the tensor whose parts, of one size, it joins.

    Args:
        joint: the joint.
        along: the dimension that the parts lie along, counted from the end; None where stacked.
    """
    parts, dim = joined(joint)
    assert isinstance(dim, int)  # whoever asks has seen that
    if joint.target in CATS:
        # Of parts (..., c, *rest), along c: (..., n, c, *rest), and then (..., n * c, *rest).
        outer = dim if dim >= 0 else dim - 1
        return [("movedim", (0, outer)), ("flatten", (outer, outer + 1))]
    if along is None:
        return [("movedim", (0, dim))] if dim else []
    # Of parts (..., c, *rest), along c: (..., n, c, *rest), and then n to its place.
    return [("unflatten", (along, (len(parts), -1))), ("movedim", (along - 1, dim))]


def otherwise(
    joint: fx.Node, along: int | None, modules: Mapping[str, nn.Module]
) -> Mapping[fx.Node, Any] | None:
    """The values that lie in another way once its `steps` stand for a joint, where that is known.

    None where somebody could tell.
    """
    value, (parts, _) = joint.meta.get(EXAMPLE), joined(joint)
    if not isinstance(value, Tensor):
        return None if strides.reads_strides(joint, modules, escapes=True) else {}
    if {functional.memory_format(part) for part in parts} != {torch.contiguous_format}:
        return None
    with strides.quietly(value), torch.no_grad():
        values = [part.meta[EXAMPLE] for part in parts]
        made = torch.stack(values) if along is None else torch.cat(values, along)
        for method, given in steps(joint, along):
            made = getattr(made, method)(*given)
        return strides.followed(joint.graph, {joint: made}, modules)


def is_one(along: int, dim: int, joint: fx.Node) -> bool:
    """Whether a joint of Dynamo's, along `dim`, lies as what is cut along `along` does."""
    value, (parts, _) = joint.meta[EXAMPLE], joined(joint)
    formats = {functional.memory_format(node) for node in (joint, *parts)}
    return along % value.dim() == dim % value.dim() and len(formats) == 1 and None not in formats
