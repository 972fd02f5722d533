"""Which nodes may trade places: none is moved past a node that may change something."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph.hazards import (
    INPLACE_OPERATORS,
    WAYS_OUT,
    called,
    first_input,
    is_inplace_name,
    is_opaque,
    is_pure,
    of_torch,
    shares_memory,
    written,
)
from conjoin.layers.product import Product
from conjoin.layers.wide import Wide

SPLITS = frozenset({"unsafe_split_with_sizes", "unstack"})
"""Functions that cut a tensor into parts that have no memory in common."""

PRODUCTS: tuple[Any, ...] = (operator.matmul, torch.matmul, torch.mm, torch.addmm, F.linear)
"""Functions that multiply matrices."""

ALLOCATING: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, *PRODUCTS),
        *(F.conv1d, F.conv2d, F.conv3d, F.embedding, F.batch_norm, F.group_norm, F.layer_norm),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    }
)
"""Functions whose result is a tensor with memory of its own, or no tensor."""

VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t T mT swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze select slice narrow expand _unsafe_view contiguous getitem".split()
)
"""Methods, functions and ATen operations that give the memory of their first input, or new."""

CREATING = frozenset(
    "clone lift_fresh_copy zeros ones full empty arange zeros_like ones_like full_like empty_like "
    "new_zeros new_ones new_full new_empty".split()
)
"""Methods, functions and ATen operations that do so as well: `torch.tensor(1.0)` is exported as a
copy of a constant, which is detached in place."""


class Epochs(dict[fx.Node, int]):
    """The epochs of nodes, found when the first is asked for.

    One that a pass has put in since is in that of the node before it.
    """

    def __init__(self, find: Callable[[], dict[fx.Node, int]]) -> None:
        """Keeps what finds them."""
        super().__init__()
        self._find = find

    def settled(self) -> Epochs:
        """Itself, with the epochs as they are now, before the graph is changed."""
        if not self:
            self.update(self._find())
        return self

    def __missing__(self, node: fx.Node) -> int:
        self.settled()
        if node not in self:
            self[node] = self[node.prev]
        return self[node]


def epochs_of(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    harmless: Callable[[fx.Node], bool] = lambda changing: False,
) -> Epochs:
    """How many nodes that may change something stand before each node.

    A pure node may trade places with another of the same epoch, as far as its inputs allow. What
    changes a tensor that nobody else can see counts as pure: `relu(conv(x), inplace=True)`.

    Args:
        graph: the graph.
        modules: the modules that it calls, by target.
        harmless: whether a node that changes its first input and nothing else does not count.
    """
    return Epochs(lambda: _epochs(graph, modules, harmless))


def _epochs(
    graph: fx.Graph, modules: Mapping[str, nn.Module], harmless: Callable[[fx.Node], bool]
) -> dict[fx.Node, int]:
    found: dict[fx.Node, int] = {}
    fresh: set[fx.Node] = set()
    epoch = 0
    for node in graph.nodes:
        if _is_fresh(node, fresh, modules):
            fresh.add(node)
            fresh |= _parts_of_their_own(node)
        elif not is_pure(node, modules):
            epoch += not (_changes_first_only(node, modules) and harmless(node))
        found[node] = epoch
    return found


def _is_fresh(node: fx.Node, fresh: set[fx.Node], modules: Mapping[str, nn.Module]) -> bool:
    """Whether the memory of a node's output is its own.

    So is that of a part, as long as the whole has been cut and nothing else, and of a view or what
    is changed in place where it was the input's own and the input is read here only.
    """
    first = first_input(node)
    own = first in fresh and first is not None and len(first.users) == 1
    changed = list(written(node, modules))
    if changed:
        # Where `out=` or an unknown function writes, there is more to it than the first input.
        return own and _changes_first_only(node, modules)
    if node.op == "call_module":
        module = modules[str(node.target)]
        return not is_opaque(module) and not shares_memory(node, modules) and _allocates(module)
    if node.op not in ("call_function", "call_method"):
        return False
    if called(node) in SPLITS:
        return own
    known = node.op == "call_method" or of_torch(node.target)
    if known and called(node) in VIEWS:
        return own or node in fresh
    return node in fresh or makes_memory(node)


def makes_memory(node: fx.Node) -> bool:
    """Whether a call of a function or method is known to give a tensor with memory of its own."""
    known = node.op == "call_method" or (node.op == "call_function" and of_torch(node.target))
    makes = node.target in ALLOCATING or (known and called(node) in CREATING)
    return makes and "out" not in node.kwargs


def _parts_of_their_own(split: fx.Node) -> set[fx.Node]:
    """The parts that a split gives to one node only; none of any other node."""
    if called(split) not in SPLITS:
        return set()
    taken = Counter(user.args[1:] for user in split.users)
    return {user for user in split.users if taken[user.args[1:]] == 1}


def _changes_first_only(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if list(written(node, modules)) != [first_input(node)]:
        return False
    if node.op == "call_module":
        return not is_opaque(modules[str(node.target)])
    known = node.target in INPLACE_OPERATORS
    known |= node.op == "call_function" and of_torch(node.target)
    known |= node.op == "call_method" and is_inplace_name(str(node.target))
    return known and "out" not in node.kwargs and called(node) not in WAYS_OUT


def _allocates(module: nn.Module) -> bool:
    """Whether a module of PyTorch's gives a tensor with memory of its own."""
    modules = nn.modules
    return isinstance(
        module,
        (
            Wide,
            Product,
            nn.Linear,
            nn.Embedding,
            modules.conv._ConvNd,
            modules.batchnorm._BatchNorm,
            nn.GroupNorm,
            nn.LayerNorm,
            nn.RMSNorm,
            nn.PReLU,
            modules.instancenorm._InstanceNorm,
            modules.pooling._MaxPoolNd,
            modules.pooling._AvgPoolNd,
        ),
    )
