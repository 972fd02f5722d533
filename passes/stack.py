"""Equal products of the parts of one tensor, with weights of their own, become one batched product.

    p_i = W[i];  y_i = g(p_i) V_i^T + b_i
                                 becomes        y = g(P) stack(V_i)^T + stack(b_i);  y_i = y[i]

P: (n, ..., in), the parts stacked, V_i: (out, in), y: (n, ..., out), and g what acts on each
element. That is what `conjoin.passes.towers` does where weights are merged once. In the graphs of
`torch.compile` they are parameters of a model that stays as it is, or the second layers of one
whose forward was not rewritten; so they are stacked in each call, where that costs less than it
saves, by an estimate, and no gradients come back.

Measured under Inductor on one core, 4 to 32 experts of width 16 or 64 on 16 and 256 rows take 0.57
to 0.96 of the time so, with their second layers and what joins them. On one row, which Inductor
multiplies without a library, they take up to 1.16, so there they stay apart. So do layers that read
tensors of their own: to stack those as well leaves 0.76 to 1.4.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from conjoin.graph import bundles, edit, functional, strides
from conjoin.graph.bundles import Bundle
from conjoin.graph.epochs import Epochs
from conjoin.graph.meta import EXAMPLE, is_of_dynamo
from conjoin.graph.rewriting import Rewrite
from conjoin.passes import join, sink
from conjoin.policy import joining, machine
from conjoin.policy.cost import Lie, Setting
from conjoin.programs.fakes import elements


class Stack(Rewrite):
    """Stacks the weights of equal layers of the branches at each call, where that pays."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        if not is_of_dynamo(graph):
            return PassResult(graph_module, False)
        epochs = functional.epochs(graph, modules)
        changed = bundles.rework(graph, lambda bundle: _climb(graph, bundle, modules, epochs))
        return PassResult(graph_module, changed)


def _climb(
    graph: fx.Graph, bundle: Bundle, modules: Mapping[str, nn.Module], epochs: Epochs
) -> list[fx.Node]:
    """Makes products one that are reached from neighbouring parts; the splits that there are then.

    The split moves below what is done to the parts before, since it moves below the products.
    """
    ways = {part: sink.onward(bundle, i, modules, epochs) for i, part in enumerate(bundle.parts)}

    def key(node: fx.Node, part: fx.Node, size: int) -> Hashable | None:
        keys, nodes = ways[part]
        product = _product(nodes[-1], modules)
        if product is None or epochs[product.node] != epochs[bundle.split]:
            return None
        return keys, size, _alike(product)

    for positions in bundles.runs(bundle, key):
        ends = [ways[bundle.parts[i]][1][-1] for i in positions]
        found = [_product(end, modules) for end in ends]
        products = [product for product in found if product is not None]
        if not _pays(products, "stack" if bundle.dim is None else "beside"):
            continue
        inner = bundles.carve(graph, bundle, positions.start, positions.stop)
        for _ in ways[bundle.parts[positions.start]][0]:
            (split, *_) = sink.move(graph, inner, range(len(inner.parts)), modules)
            moved = bundles.bundle_at(split)
            assert moved is not None  # it was cut just now
            inner = moved
        return _stack(graph, inner, products)
    return []


def _product(node: fx.Node, modules: Mapping[str, nn.Module]) -> join.ParameterProduct | None:
    """The only reader of a node as a product with parameters of several rows; None if it is not."""
    reader = next(iter(node.users), None)
    if reader is None or len(node.users) > 1 or reader.target is not F.linear:
        return None
    product = join.product_of(reader, modules)
    given, read = functional.arguments(reader)["input"], node.meta.get(EXAMPLE)
    if product is None or given is not node or not isinstance(read, Tensor):
        return None
    rows = elements(read) // max(product.weight.meta[EXAMPLE].shape[1], 1)
    known = read.dim() > 1 and rows > 1
    return product if known and not strides.reads_memory(reader, modules) else None


def _alike(product: join.ParameterProduct) -> Hashable:
    weight, made = product.weight.meta[EXAMPLE], product.node.meta[EXAMPLE]
    sizes = tuple(map(str, made.shape))
    biased = product.bias is not None
    return sizes, weight.shape, weight.dtype, weight.device, biased, made.requires_grad


def _pays(products: Sequence[join.ParameterProduct], lie: Lie) -> bool:
    """Whether it costs less to stack the weights than it saves."""
    first = products[0]
    weight, made = first.weight.meta[EXAMPLE], first.node.meta[EXAMPLE]
    known = machine.constants(weight.device, weight.dtype)
    if known is None or made.requires_grad:
        return False
    reads = [functional.arguments(each.node)["input"].meta[EXAMPLE] for each in products]
    works = [join.work_of(each, read) for each, read in zip(products, reads, strict=True)]
    return joining.estimate_level(known, works, Setting(training=False), lie).pays


def _stack(
    graph: fx.Graph, bundle: Bundle, products: Sequence[join.ParameterProduct]
) -> list[fx.Node]:
    """Puts one batched product in the place of products that read the parts of one tensor."""
    value, count = products[0].node.meta[EXAMPLE], len(products)
    with graph.inserting_before(bundle.split):
        stack = bundle.whole
        if bundle.dim is not None:
            stack = bundles.stacked(graph, stack, count)
        rows = stack if value.dim() == 2 else graph.call_method("flatten", (stack, 1, -2))
        weights = graph.call_function(torch.stack, ([each.weight for each in products],))
        turned = graph.call_method("transpose", (weights, 1, 2))
        biases = [each.bias for each in products if each.bias is not None]
        if biases:
            bias = graph.call_function(torch.stack, (biases,))
            addend = graph.call_method("unsqueeze", (bias, 1))
            made = graph.call_function(torch.baddbmm, (addend, rows, turned))
        else:
            made = graph.call_function(torch.bmm, (rows, turned))
        if value.dim() > 2:
            sizes = [graph.call_method("size", (stack, i)) for i in range(1, value.dim())]
            made = graph.call_method("unflatten", (made, 1, tuple(sizes)))
    return bundles.replace(graph, bundle, [p.node for p in products], made, (1,) * count, None)
