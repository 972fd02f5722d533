"""Equal products of the parts of one tensor, with weights of their own, become one batched product.

    p_i = W[i];  y_i = g(p_i) V_i^T + b_i
                                 becomes        y = g(P) stack(V_i)^T + stack(b_i);  y_i = y[i]

P: (n, ..., in), the parts stacked, V_i: (out, in), y: (n, ..., out), and g what acts on each
element. That is what `conjoin.passes.towers` does where weights are merged once. In the graphs of
`torch.compile` they are parameters of a model that stays as it is, or the second layers of one
whose forward was not rewritten; so they are stacked in each call, where that costs less than it
saves, by an estimate, and no gradients come back. Slices that follow on one another, as of layers
that were merged, are a stack as they are, with gradients or without.

Measured under Inductor on one core, 4 to 32 experts of width 16 or 64 on 16 and 256 rows take 0.57
to 0.96 of the time so, with their second layers and what joins them; where the weights are a stack
already, 8 of width 16 on 64 rows take 0.67 in a step of training and 0.69 forward. On one row,
which Inductor multiplies without a library, they take up to 1.16, so there they stay apart. So do
layers that read tensors of their own: to stack those as well leaves 0.76 to 1.4.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from conjoin.graph import bundles, edit, functional, strides
from conjoin.graph.bundles import Bundle
from conjoin.graph.epochs import Epochs
from conjoin.graph.meta import EXAMPLE, is_of_dynamo
from conjoin.graph.rewriting import Rewrite
from conjoin.layers.kind import elements
from conjoin.passes import join, rejoin, sink
from conjoin.passes.rejoin import Slice
from conjoin.policy import joining, machine
from conjoin.policy.cost import Layout, Setting


class Stack(Rewrite):
    """Makes equal layers of the branches a batched product, where that pays at each call."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        if not is_of_dynamo(graph):
            return PassResult(graph_module, False)
        epochs = functional.epochs(graph, modules)
        changed = bundles.rework(graph, lambda bundle: _climb(graph, bundle, modules, epochs))
        return PassResult(graph_module, changed)


@dataclass(frozen=True, slots=True)
class Member:
    """A product that may be one of a batched product.

    Attributes:
        node: the call.
        shape: the shape of its weight.
        weight: the node of its weight, a parameter, or the slice that it is.
        bias: likewise, if there is one.
        alike: what is equal for members of one batched product.
    """

    node: fx.Node
    shape: tuple[int, int]
    weight: fx.Node | Slice
    bias: fx.Node | Slice | None
    alike: Hashable


def _climb(
    graph: fx.Graph, bundle: Bundle, modules: Mapping[str, nn.Module], epochs: Epochs
) -> list[fx.Node]:
    """Makes products one that are reached from neighbouring parts; the splits that there are then.

    The split moves below what is done to the parts before, since it moves below the products.
    """
    ways = {part: sink.onward(bundle, i, modules, epochs) for i, part in enumerate(bundle.parts)}
    members = {part: _member(nodes[-1], modules) for part, (_, nodes) in ways.items()}

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        member = members[part]
        if member is None or epochs[member.node] != epochs[bundle.split]:
            return None
        return ways[part][0], size, member.alike

    for positions in bundles.runs(bundle, key):
        found = [members[bundle.parts[i]] for i in positions]
        run = [member for member in found if member is not None]
        if not _pays(run, "stack" if bundle.dim is None else "beside"):
            continue
        steps, _ = ways[bundle.parts[positions.start]]
        inner = _as_stack(graph, bundles.carve(graph, bundle, positions.start, positions.stop))
        for _ in steps:
            (split, *_) = sink.move(graph, inner, range(len(run)), modules)
            inner = _bundle_at(split)
        return _stack(graph, inner, run)
    return []


def _member(node: fx.Node, modules: Mapping[str, nn.Module]) -> Member | None:
    """The only reader of a node as a product of several rows that may be a member; None if not."""
    reader, read = next(iter(node.users), None), node.meta.get(EXAMPLE)
    if reader is None or len(node.users) > 1 or reader.target is not F.linear:
        return None
    given, made = functional.arguments(reader), reader.meta.get(EXAMPLE)
    if given["input"] is not node or not isinstance(read, Tensor) or not isinstance(made, Tensor):
        return None
    shape = int(made.shape[-1]), int(read.shape[-1])
    if read.dim() < 2 or elements(read) < 2 * shape[1] or strides.reads_memory(reader, modules):
        return None
    facts = [*map(str, made.shape), shape, made.dtype, made.device, made.requires_grad]
    weight, bias = (_slice_of_input(given.get(name), made.dtype) for name in ("weight", "bias"))
    if weight is not None and (given.get("bias") is None) == (bias is None):
        wholes = weight.whole, None if bias is None else bias.whole
        return Member(reader, shape, weight, bias, (*facts, *wholes))
    product = join.product_of(reader, modules)
    if product is None or made.requires_grad:
        return None
    return Member(reader, shape, product.weight, product.bias, (*facts, product.bias is None))


def _slice_of_input(node: object, dtype: torch.dtype) -> Slice | None:
    """The rows that a node takes of an input of the graph of some type; None of anything else."""
    found = rejoin.slice_of(node)
    value = None if found is None else found.whole.meta.get(EXAMPLE)
    if found is None or found.whole.op != "placeholder" or found.shape is not None:
        return None
    return found if isinstance(value, Tensor) and value.dtype == dtype else None


def _pays(members: Sequence[Member], layout: Layout) -> bool:
    """Whether it costs less than it saves."""
    made = members[0].node.meta[EXAMPLE]
    read = functional.arguments(members[0].node)["input"].meta[EXAMPLE]
    known = machine.constants(made.device, made.dtype)
    slices = [(member.weight, member.bias) for member in members]
    sliced = isinstance(members[0].weight, Slice)
    if known is None or (sliced and not all(_follow(*two) for two in zip(*slices, strict=True))):
        return False
    setting = Setting(made.requires_grad, passed_on=read.requires_grad)
    works = [
        join.work_of(member.node, member.shape, biased=member.bias is not None)
        for member in members
    ]
    figures = joining.estimate_level(known, works, setting, layout)
    return figures.pays_whole if sliced else figures.pays


def _follow(*slices: fx.Node | Slice | None) -> bool:
    """Whether slices follow on one another; so do biases that there are none of."""
    found = [each for each in slices if isinstance(each, Slice)]
    return not found or all(first.precedes(second) for first, second in pairwise(found))


def _as_stack(graph: fx.Graph, bundle: Bundle) -> Bundle:
    """A bundle whose parts are stacked."""
    if bundle.dim is None:
        return bundle
    with graph.inserting_before(bundle.split):
        stack = bundles.stacked(graph, bundle.whole, len(bundle.parts))
        parts = bundles.cut(graph, stack, (1,) * len(bundle.parts), None)
    bundles.substitute(graph, bundle.parts, parts)
    graph.erase_node(bundle.split)
    return _bundle_at(parts[0].all_input_nodes[0])


def _bundle_at(split: fx.Node) -> Bundle:
    found = bundles.bundle_at(split)
    assert found is not None  # it was cut just now
    return found


def _stack(graph: fx.Graph, bundle: Bundle, members: Sequence[Member]) -> list[fx.Node]:
    """Puts one batched product in the place of products that read the parts of a stack."""
    rank, count = members[0].node.meta[EXAMPLE].dim(), len(members)
    out, width = members[0].shape
    with graph.inserting_before(bundle.split):
        stack = bundle.whole
        rows = stack if rank == 2 else graph.call_method("flatten", (stack, 1, -2))
        weight = _stacked(graph, [each.weight for each in members], (count, out, width))
        turned = graph.call_method("transpose", (weight, 1, 2))
        biases = [each.bias for each in members if each.bias is not None]
        if biases:
            bias = graph.call_method("unsqueeze", (_stacked(graph, biases, (count, out)), 1))
            made = graph.call_function(torch.baddbmm, (bias, rows, turned))
        else:
            made = graph.call_function(torch.bmm, (rows, turned))
        if rank > 2:
            sizes = [graph.call_method("size", (stack, i)) for i in range(1, rank)]
            made = graph.call_method("unflatten", (made, 1, tuple(sizes)))
    slices = [node for each in members for node in _nodes_of(each.weight, each.bias)]
    splits = bundles.replace(
        graph, bundle, [each.node for each in members], made, (1,) * count, None
    )
    edit.erase_unread(graph, slices)
    return splits


def _nodes_of(*values: fx.Node | Slice | None) -> Iterable[fx.Node]:
    return (node for value in values if isinstance(value, Slice) for node in value.nodes)


def _stacked(graph: fx.Graph, values: Sequence[fx.Node | Slice], shape: tuple[int, ...]) -> fx.Node:
    """A stack of parameters; what it is already, of slices."""
    slices = [value for value in values if isinstance(value, Slice)]
    if slices:
        return graph.call_method("view", (rejoin.rows(graph, slices), shape))
    tensors = [value for value in values if isinstance(value, fx.Node)]
    return graph.call_function(torch.stack, (tensors,))
