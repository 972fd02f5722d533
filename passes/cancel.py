"""Joining all parts of a tensor again gives the tensor.

    cat(W[0], W[1], ..., W[n-1])                          becomes    W
    stack(W[0], ..., W[n-1]), W stacked or of equal parts becomes    W with its dimensions moved
    cat(W[0], W[1], ..., W[n-1]), W stacked               becomes    the same, and two made one

where the parts come in order, along the dimension that they were cut along, and nobody else reads
them. `Widen` gives them that order, which is any at first. So `Split -> Unite -> Split` is one
split, and experts that are stacked for their gates are the batched product as it is.

    cat(x, W[0], ..., W[n-1], z)                          becomes    cat(x, W, z)
    stack(x, W[0], ..., W[n-1])                           becomes    cat(x, W), unsqueezed and moved

where other tensors are joined with them. So W is not cut, nor its gradient joined.

    split(cat(W[0], ..., W[n-1]))                         becomes    W[0], ..., W[n-1]

where the pieces are the parts again, so that other passes see what is done to them. What joins
outputs of several layers stays joined: a loss that leaves a piece out gives its layer zeros for a
gradient, and would give it none.

    W[0] + W[1] + ... + W[n-1]                            stays

where the parts are a x, b x and so on, though it is (A + B + ...) x, and that would give each
branch its exact gradient: the sum of the weights passes its own on to all of them. But the sum
would be made at each call, so that two launches for two branches, a wide product and an addition,
would be as many, and in half precision it would be rounded before the product, not after it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import (
    bundles,
    channelwise,
    congruence,
    edit,
    elementwise,
    functional,
    hazards,
    joints,
    strides,
)
from conjoin.graph.bundles import Bundle
from conjoin.graph.epochs import Epochs
from conjoin.graph.meta import EXAMPLE, value_of
from conjoin.graph.rewriting import Rewrite
from conjoin.layers.wide import Wide

PIECES: frozenset[Any] = frozenset(
    {torch.split, torch.chunk, torch.split_with_sizes, "split", "chunk", "split_with_sizes"}
)
"""What cuts a tensor into views."""

SPLITS: frozenset[Any] = frozenset({torch.unsafe_split_with_sizes, torch.split, "split"})
"""What cuts a tensor into parts of given sizes."""


class Cancel(Rewrite):
    """Takes out joints of parts that were cut just before."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        changed = False
        for node in list(graph.nodes):
            if joints.is_joint(node):
                changed |= (
                    _as_stack(graph, node)
                    or _cancel(graph, node, modules)
                    or _cancel_among_others(graph, node, modules)
                )
            elif node.target in PIECES:
                changed |= _recut(node, modules)
        return PassResult(graph_module, changed)


def _as_stack(graph: fx.Graph, cat: fx.Node) -> bool:
    """Writes `cat([x.unsqueeze(d), ...], d)` as `stack([x, ...], d)`."""
    parts, dim = joints.joined(cat)
    if cat.target in joints.STACKS or not parts or not isinstance(dim, int):
        return False
    unsqueezed = [
        part.args[0]
        for part in parts
        if part.target in ("unsqueeze", torch.unsqueeze)
        and part.args[1:] == (dim,)
        and not part.kwargs
        and len(part.users) == 1
    ]
    if len(unsqueezed) < len(parts):
        return False
    nodes = [part for part in unsqueezed if isinstance(part, fx.Node)]
    known = [part for part in nodes if isinstance(value_of(part), Tensor)]
    if {functional.memory_format(part) for part in known} - {torch.contiguous_format}:
        return False  # As a stack it would lie as they do.
    cat.target = torch.stack
    cat.args, cat.kwargs = (unsqueezed, dim), {}
    for part in parts:
        graph.erase_node(part)
    return True


def _cancel(graph: fx.Graph, joint: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Takes out one joint, if it joins all parts of one tensor."""
    parts, dim = joints.joined(joint)
    if not parts or not isinstance(dim, int) or any(len(part.users) != 1 for part in parts):
        return False
    split = parts[0].args[0] if parts[0].target is operator.getitem else None
    if not isinstance(split, fx.Node) or not _in_order(parts, split):
        return False
    if not _may_stand_for(split, joint, modules):
        return False
    epochs = functional.epochs(graph, modules)
    if epochs[split] != epochs[joint]:
        return False
    bundle = bundles.bundle_at(split)
    changed: Mapping[fx.Node, Any] | None = {}
    if bundle is not None and (bundle.dim is None or joint.target in joints.STACKS):
        changed = joints.otherwise(joint, bundle.dim, modules)
    if changed is None:
        return False
    with graph.inserting_before(joint):
        whole = _whole(graph, joint, split, dim)
    if whole is None:
        return False
    for node, moved in changed.items():
        node.meta[EXAMPLE] = moved
    bundles.substitute(graph, [joint], [whole])
    for node in (*parts, split):
        graph.erase_node(node)
    return True


def _cancel_among_others(graph: fx.Graph, joint: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Joins a tensor with others in the place of all its parts, if nothing is copied for that."""
    parts, dim = joints.joined(joint)
    if not isinstance(dim, int) or joint.target is bundles.batched:
        return False
    found = _all_parts_of_one(parts)
    if found is None or strides.reads_strides(joint, modules, escapes=True):
        return False
    start, split = found
    stop = start + len(split.users)
    before, taken, after = parts[:start], parts[start:stop], parts[stop:]
    is_stack, epochs = joint.target in joints.STACKS, functional.epochs(graph, modules)
    # A stack of tensors side by side is a joint of many small pieces in any case.
    if (split.target in SPLITS) is is_stack or epochs[split] != epochs[joint]:
        return False
    with graph.inserting_before(joint):
        whole = _whole(graph, joint, split, dim)
        if whole is None:
            return False
        if is_stack:
            before, after = (
                [graph.call_method("unsqueeze", (each, dim)) for each in others]
                for others in (before, after)
            )
        made = graph.call_function(torch.cat, ([*before, whole, *after], dim))
    bundles.substitute(graph, [joint], [made])
    for node in (*taken, split):
        graph.erase_node(node)
    return True


def _all_parts_of_one(parts: list[fx.Node]) -> tuple[int, fx.Node] | None:
    """Where in what is joined all parts of one tensor follow on one another, and their split.

    Nobody else reads them, and the other tensors are no more than they are.
    """
    for start, part in enumerate(parts):
        split = part.args[0] if part.target is operator.getitem else None
        if not isinstance(split, fx.Node) or part.args[1] != 0:
            continue
        taken = parts[start : start + len(split.users)]
        alone = all(len(each.users) == 1 and parts.count(each) == 1 for each in taken)
        if alone and _in_order(taken, split) and len(taken) < len(parts) <= 2 * len(taken):
            return start, split
    return None


def _recut(split: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Makes the pieces of a joint parts as they were before, if they are the same ones."""
    joint = split.args[0] if split.args else None
    if not isinstance(joint, fx.Node) or joint.target is not bundles.rejoined:
        return False
    sizes: Any
    sizes, along, dim = joint.args[1:]
    given = (*split.args[1:], *split.kwargs.values())
    if along != dim or given[1:] != (dim,) or not {*split.kwargs} <= {"dim"}:
        return False
    pieces = given[0]
    if hazards.called(split) == "chunk":
        same = pieces == len(sizes) and len({*sizes}) == 1
    else:
        same = isinstance(pieces, (list, tuple)) and [*pieces] == [*sizes]
    # Autograd does not let a piece be changed in place, and would a part.
    if not same or any(hazards.is_seen(piece, modules) for piece in split.users):
        return False
    split.op, split.target = "call_function", torch.unsafe_split_with_sizes
    split.args, split.kwargs = (joint, [*sizes], dim), {}
    return True


def takes_out(
    joint: fx.Node,
    bundle: Bundle,
    branches: Sequence[Sequence[fx.Node]],
    modules: Mapping[str, nn.Module],
    epochs: Epochs,
) -> bool:
    """Whether a joint of Dynamo's goes, once the split of what it joins stands right before it.

    Args:
        joint: what reads the branches.
        bundle: the tensor that is cut.
        branches: for neighbouring parts the node of each, and of what comes of it, up to the joint.
        modules: the modules that the graph calls, by target.
        epochs: the epochs of the nodes.
    """
    if not joints.is_joint(joint) or epochs[joint] != epochs[bundle.split]:
        return False
    parts, dim = joints.joined(joint)
    if parts != [nodes[-1] for nodes in branches] or not isinstance(dim, int):
        return False
    if any(len(part.users) != 1 for part in parts):
        return False
    between = branches[0][1:]
    if len(parts) < len(bundle.parts) and not _allocates(between, modules):
        return False  # It would be a slice.
    if not _may_stand_for(bundle.split, joint, modules, between):
        return False
    if bundle.dim is not None and joint.target in joints.CATS:
        return joints.is_one(bundle.dim, dim, joint)
    sizes = {bundle.sizes[bundle.parts.index(nodes[0])] for nodes in branches}
    return len(sizes) == 1 and joints.otherwise(joint, bundle.dim, modules) is not None


def _whole(graph: fx.Graph, joint: fx.Node, split: fx.Node, dim: int) -> fx.Node | None:
    """What the joint gives, made of the tensor that was cut; None where it is not the same."""
    source = split.args[0]
    if not isinstance(source, fx.Node):
        return None
    bundle, value = bundles.bundle_at(split), joint.meta.get(EXAMPLE)
    if joint.target in joints.CATS and (bundle is None or bundle.dim is not None):
        given = split.args[2:] or (*split.kwargs.values(),)
        if split.target not in SPLITS or len(given) != 1 or not {*split.kwargs} <= {"dim"}:
            return None
        along = given[0]
        if not isinstance(along, int):
            return None
        if isinstance(value, Tensor):
            return source if joints.is_one(along, dim, joint) else None
        if not (along == dim or _may_be_one(along, dim)):
            return None
        return graph.call_function(bundles.rejoined, (source, split.args[1], along, dim))
    if bundle is None or not bundle.equal:
        return None
    if bundle.dim is not None and value is None:
        arguments = (source, list(bundle.sizes), bundle.dim, bundle.dim)
        source = graph.call_function(bundles.rejoined, arguments)
    for method, given in joints.steps(joint, bundle.dim):
        source = graph.call_method(method, (source, *given))
    return source


def _may_be_one(along: int, dim: int) -> bool:
    """Whether a dimension counted from the end is likely the one that is counted from the start.

    That depends on the rank; images have their channels in dimension 1, if there is a batch.
    """
    return along < 0 < dim and (along == -1 or dim == 1)


def _may_stand_for(
    split: fx.Node,
    joint: fx.Node,
    modules: Mapping[str, nn.Module],
    between: Sequence[fx.Node] = (),
) -> bool:
    """Whether nobody could tell the tensor that is cut from a new one that holds its parts.

    It must have memory that nothing else has, not be kept for backward where the joint may be
    changed, and lie as a new tensor would where that matters. So must what comes of it, where
    something is done to each part in between.
    """
    source = split.args[0]
    if not isinstance(source, fx.Node) or not all(
        user is split or _reads_shape(user) for user in source.users
    ):
        return False
    value = joint.meta.get(EXAMPLE)
    trained = not isinstance(value, Tensor) or value.requires_grad
    chain, node = [*between], source
    while (step := _step(node, modules) or _cut_from(node, chain, modules)) is not None:
        chain.append(node)
        if hazards.shares_memory(node, modules) and len(step.users) != 1:
            return False
        node = step
    saved = trained and any(elementwise.saves_output(each, modules) for each in chain)
    if saved and hazards.is_seen(joint, modules):
        return False
    return _is_new(node, modules)


def _allocates(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> bool:
    """Whether what nodes make of one another lies in memory of its own."""
    return any(not hazards.shares_memory(node, modules) for node in nodes)


def _cut_from(
    node: fx.Node, behind: Sequence[fx.Node], modules: Mapping[str, nn.Module]
) -> fx.Node | None:
    """What a node is cut from, as products are in Dynamo's graphs, if what it gives is copied."""
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or not _allocates(behind, modules):
        return None
    bundle = bundles.bundle_at(split)
    return None if bundle is None or bundle.dim is None else bundle.whole


def _step(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """What a node reads that acts on each element or channel, and so keeps the order in memory."""
    if not node.args or not isinstance(input := node.args[0], fx.Node):
        return None
    if node.target is channelwise.softmax_of_parts:
        return input
    if _is_norm(node, modules):
        return None if input.target in ("flatten", bundles.beside) else input
    known = elementwise.key(node, input, modules) or any(
        channelwise.key(node, input, -1 - dimensions, modules) for dimensions in (1, 2, 3)
    )
    return input if known and node.all_input_nodes == [input] else None


def _is_norm(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls a wide normalization."""
    if node.op != "call_module" or "dim" not in node.kwargs:
        return False
    return isinstance(modules[str(node.target)], Wide)


def _is_new(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer gave the node's value, in memory of its own, in the usual order."""
    if node.op != "call_module":
        return functional.is_product(node) or functional.is_batched(node)
    if _is_norm(node, modules):  # Of what was laid side by side for it, see `_step`.
        return True
    module = modules[str(node.target)]
    layers = (Wide, nn.Linear, nn.modules.conv._ConvNd)
    return isinstance(module, layers) and not hazards.is_opaque(module)


def _reads_shape(node: fx.Node) -> bool:
    attribute = node.target is getattr and node.args[1] in congruence.ATTRIBUTES
    return attribute or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def _in_order(parts: list[fx.Node], split: fx.Node) -> bool:
    """Whether parts are all that a node cuts, in order."""
    if split.target in SPLITS:
        sizes = split.args[1] if len(split.args) > 1 else None
        count = len(sizes) if isinstance(sizes, (list, tuple)) else 0
    else:
        found = bundles.bundle_at(split)
        count = 0 if found is None else len(found.parts)
    items = [(part.target, part.args) for part in parts]
    expected = [(operator.getitem, (split, index)) for index in range(count)]
    return items == expected and len(split.users) == count > 0
