"""How many dimensions the values of a graph have, and how many items there are in a shape.

Code asks for it all the time: `(*x.shape[:-1], -1, 64)`, `if x.dim() == 3`. It follows from the
numbers of dimensions of the inputs alone, whatever their sizes, so a rewritten forward looks on
each call at these. What is not known by the rules here is not known at all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from conjoin.graph import elementwise
from conjoin.layers.subclass import plain_class
from conjoin.tracing.proxies import Proxy, UnsoundError, unpack

KEEPING = (
    *elementwise.ACTIVATIONS, *elementwise.DROPOUTS, nn.Linear, nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Softmax,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd, nn.Upsample,
)  # fmt: skip
"""Modules whose output has as many dimensions as their input."""

SAME = frozenset(
    "contiguous clone detach to type_as float double half bfloat16 long int bool softmax "
    "log_softmax dropout layer_norm batch_norm group_norm instance_norm rms_norm normalize cumsum "
    "flip roll permute transpose swapaxes interpolate pad".split()
)
"""Functions and methods whose result has as many dimensions as their first argument."""

RESHAPING = frozenset(
    "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_ resize_as_sparse_ "
    "set_ as_strided_".split()
)
"""Functions and methods that give a tensor another number of dimensions in place."""


class Ranks:
    """What is known of the nodes of one graph.

    Attributes:
        inputs: the nodes of the graph's inputs, in order, and how many dimensions they have; -1
            where that differs.
        asked: the inputs whose number of dimensions something depends on.
    """

    def __init__(self, module_of: Callable[[str], nn.Module]) -> None:
        self.inputs: dict[fx.Node, int] = {}
        self.asked: set[fx.Node] = set()
        self._module_of = module_of
        self._known: dict[fx.Node, int | None] = {}

    def rank(self, value: Any) -> int | None:
        """How many dimensions a node's value has, 0 for a number; None where that is not known."""
        if isinstance(value, (bool, int, float)):
            return 0
        if not isinstance(value, fx.Node):
            return None
        if self.inputs.get(value, -1) >= 0:
            self.asked.add(value)
            return self.inputs[value]
        if value not in self._known:
            self._known[value] = self._rank(value)
        return self._known[value]

    def length(self, value: Any) -> int | None:
        """How many items a shape has, or a part of it; None where that is not known."""
        if isinstance(value, (tuple, list)):
            return len(value)
        if not isinstance(value, fx.Node) or value.kwargs:
            return None
        if _is_shape(value):
            return self.rank(value.args[0])
        if value.op != "call_function" or value.target not in (operator.getitem, operator.add):
            return None
        first, second = value.args
        length = self.length(first)
        if length is None:
            return None
        if value.target is operator.add:
            more = self.length(second)
            return None if more is None else length + more
        if type(second) is slice and not _has_nodes(second):
            return len(range(length)[second])
        return None

    def _rank(self, node: fx.Node) -> int | None:
        if node.op == "call_module":
            return self._of_module(node)
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        if self._is_number(node):
            return 0
        name = node.target if isinstance(node.target, str) else node.target.__name__
        first = node.args[0]
        if any(isinstance(each, fx.Node) for each in node.kwargs.values()):
            return None
        if name in SAME:
            return self._of_tensor(first)
        if name == "unsqueeze":
            rank = self._of_tensor(first)
            return None if rank is None else rank + 1
        if name in ("view", "reshape") and not node.kwargs:
            return self._of_view(node.args[1:])
        if node.target in elementwise.OPERATORS or name.removesuffix("_") in elementwise.NAMES:
            ranks = [self.rank(each) for each in node.args]
            return None if None in ranks else max(rank for rank in ranks if rank is not None)
        return None

    def _of_tensor(self, value: Any) -> int | None:
        return self.rank(value) if isinstance(value, fx.Node) else None

    def _of_module(self, node: fx.Node) -> int | None:
        module = self._module_of(str(node.target))
        cls = plain_class(module)
        if not node.args or not cls.__module__.startswith("torch.nn.modules."):
            return None
        rank = self._of_tensor(node.args[0])
        if rank is None or not issubclass(cls, (*KEEPING, nn.Embedding)):
            return None
        return rank + 1 if issubclass(cls, nn.Embedding) else rank

    def _of_view(self, sizes: tuple[Any, ...]) -> int | None:
        if len(sizes) == 1 and not isinstance(sizes[0], int):
            return self.length(sizes[0])
        plain = all(isinstance(s, int) or self._is_number(s) for s in sizes)
        return len(sizes) if plain else None

    def _is_number(self, value: Any) -> bool:
        """Whether a node stands for a size, or what is computed of sizes and numbers."""
        if not isinstance(value, fx.Node) or value.kwargs:
            return False
        if value.op == "call_method":
            return value.target == "numel" or (value.target == "size" and len(value.args) == 2)
        if value.op != "call_function":
            return False
        if value.target is operator.getitem:
            return isinstance(value.args[1], int) and _is_sizes(value.args[0])
        if value.target in (*elementwise.OPERATORS, operator.floordiv, operator.mod):
            return all(isinstance(v, (int, float)) or self._is_number(v) for v in value.args)
        return False


def _is_shape(node: fx.Node) -> bool:
    of_attribute = node.target is getattr and node.args[1] == "shape"
    return of_attribute or (node.target == "size" and len(node.args) == 1 and not node.kwargs)


def _is_sizes(value: Any) -> bool:
    """Whether a node stands for a shape or a part of one."""
    if not isinstance(value, fx.Node):
        return False
    sliced = value.target is operator.getitem and type(value.args[1]) is slice
    return _is_shape(value) or ((sliced or value.target is unpack) and _is_sizes(value.args[0]))


def _has_nodes(part: slice) -> bool:
    return any(isinstance(end, fx.Node) for end in (part.start, part.stop, part.step))


class Ranked(Proxy):
    """A proxy that answers what follows from numbers of dimensions."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if name == "ndim" and (rank := self.tracer.ranks.rank(self.node)) is not None:
            return rank
        return Attribute(self, name)

    def __len__(self) -> int:  # type: ignore[override]  # That of a proxy never returns.
        length: int | None = self.tracer.ranks.length(self.node)
        if length is None:
            raise UnsoundError("it asks how many items a tensor has")
        return length

    def items(self) -> list[fx.Proxy] | None:
        """The items of a shape; None where their number is not known."""
        length = self.tracer.ranks.length(self.node)
        return None if length is None else [self[at] for at in range(length)]  # type: ignore[index]


class Attribute(fx.proxy.Attribute, Ranked):
    """What an attribute of such a proxy gives."""

    def __getattr__(self, name: str) -> Any:
        return Ranked.__getattr__(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("root", "attr", "tracer", "_node"):
            raise UnsoundError(f"it assigns the attribute {name} of an attribute of a tensor")
        object.__setattr__(self, name, value)
