"""Which values of a graph have one shape, dtype and device, whatever the inputs are.

Two nodes are congruent where the same operation made them, with the same settings, from inputs
that are congruent in turn. It is what a stack of tensors needs to know of them beforehand.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from conjoin.graph import channelwise, elementwise, hazards
from conjoin.layers import KINDS, NORMS, held_weight, kind_of
from conjoin.layers.subclass import plain_class
from conjoin.layers.wide import Wide

NAMES = elementwise.NAMES | frozenset(
    "view reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand "
    "contiguous clone softmax log_softmax softmax_of_parts sum mean amax amin norm matmul bmm mm "
    "baddbmm addmm einsum cat concat stack where dropout layer_norm rms_norm normalize linear pad "
    "interpolate size dim numel getattr getitem matmul floordiv mod unsafe_split_with_sizes "
    "unstack unbind split chunk select slice batched layer_norm_of_parts instance_norm_of_images "
    "long int float double half bfloat16 bool".split()
)
"""Functions and methods whose result has a shape that follows from the shapes of the inputs."""

OF_NUMBERS = frozenset({operator.getitem, operator.floordiv, operator.mod, operator.matmul})
"""Python's operators that are among them."""

SIZES = frozenset({"size", "dim", "numel"})
"""Methods that give numbers that follow from shapes."""

TENSORS = (
    NAMES
    - SIZES
    - frozenset("getattr getitem split chunk unstack unbind where".split())
    - {*("unsafe_split_with_sizes", "floordiv", "mod")}
)
"""Those whose result is a tensor whatever they are given."""

SHAPED = (nn.Softmax, nn.LogSoftmax, nn.Flatten, nn.Unflatten, nn.Dropout)
"""Modules that are among them, beside layers, normalizations and what acts on elements."""

ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})
"""Attributes of a tensor that are equal where tensors are congruent."""


INPUTS = "conjoin_inputs"
"""The entry of a GraphModule's `meta` that holds what may be taken for granted of its inputs."""


@dataclass(slots=True)
class Inputs:
    """What may be taken for granted of a graph's inputs, as every call is looked at before it runs.

    Attributes:
        alike: for each input a number, equal for those of one shape, dtype and device.
        most: how many elements they may have all together; None as long as nothing depends on it.
    """

    alike: tuple[int, ...] = ()
    most: int | None = None

    def limit(self, most: int) -> None:
        """Takes for granted that the inputs have so many elements at most."""
        self.most = most if self.most is None else min(self.most, most)


def classes(
    graph: fx.Graph, modules: Mapping[str, nn.Module], alike: Sequence[int] = ()
) -> dict[fx.Node, int]:
    """A number for each node, equal for congruent ones.

    Args:
        graph: the graph.
        modules: the modules that it calls, by target.
        alike: for each input a number, equal for those that are congruent; by default none are.
    """
    given = [node for node in graph.nodes if node.op == "placeholder"]
    inputs: dict[fx.Node, Hashable] = dict(zip(given, alike, strict=False))
    numbers: dict[Hashable, int] = {}
    found: dict[fx.Node, int] = {}
    sorts: dict[fx.Node, type | None] = {}
    tensors = {*inputs, *_used_as_tensors(graph)}
    for node in graph.nodes:
        sorts[node] = Tensor if node in tensors else _sort(node, sorts)
        key = _key(node, modules, found, sorts) if node not in inputs else ("input", inputs[node])
        found[node] = numbers.setdefault(node if key is None else key, len(numbers))
    return found


def _key(
    node: fx.Node,
    modules: Mapping[str, nn.Module],
    found: Mapping[fx.Node, int],
    sorts: Mapping[fx.Node, type | None],
) -> Hashable | None:
    """What the shape of a node's value depends on; None where that is not known."""
    if node.op == "call_module":
        made = _module_key(modules[str(node.target)])
    elif node.op == "call_method":
        name = str(node.target)
        made = name if name.removesuffix("_") in NAMES else None
    elif node.op == "call_function":
        made = _function_key(node)
    elif node.op == "get_attr":
        made = _tensor_key(node)
    else:
        return None
    if made is None:
        return None
    if node.target is operator.getitem:
        arguments = _item_key(node, found, sorts)
    elif _is_arithmetic(node, sorts):
        arguments = tuple(
            found[each] if isinstance(each, fx.Node) else type(each) for each in node.args
        )
    elif hazards.called(node) == "select" and len(node.args) == 3 and type(node.args[2]) is int:
        arguments = elementwise.comparable(node.args[:2], found.__getitem__)
    else:
        arguments = elementwise.comparable((node.args, node.kwargs), found.__getitem__)
    return None if arguments is None else (node.op, made, arguments)


def _is_arithmetic(node: fx.Node, sorts: Mapping[fx.Node, type | None]) -> bool:
    """Whether a node computes with a tensor and numbers, whose types only tell the result's."""
    known = node.target in elementwise.OPERATORS and not node.kwargs
    known = known and all(isinstance(each, (fx.Node, bool, int, float)) for each in node.args)
    return known and sorts[node] is Tensor


def _used_as_tensors(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that could not be used as they are if their values were numbers."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            by_itself = user.all_input_nodes == [node] and user.args[:1] == (node,)
            if by_itself and (
                _gives_tensor(user)
                or user.target in SIZES
                or (user.target in elementwise.OPERATORS and user in found)
            ):
                found.add(node)
    return found


def _gives_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, whatever it is given."""
    if node.op == "call_module" or node.target is operator.matmul:
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    named = hazards.called(node).removesuffix("_") in TENSORS
    package = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    return named and (node.op == "call_method" or package == "torch")


def _sort(node: fx.Node, sorts: Mapping[fx.Node, type | None]) -> type | None:
    """Whether a node's value is certainly a tensor, or a number that follows from shapes."""
    inputs = [sorts[each] for each in node.all_input_nodes]
    if node.target in elementwise.OPERATORS and Tensor in inputs:
        return Tensor
    if node.target in elementwise.OPERATORS or node.target in (operator.floordiv, operator.mod):
        return int if all(each is int for each in inputs) else None
    if _gives_tensor(node):
        return Tensor
    if node.target is operator.getitem:
        shape = node.args[0]
        of_shape = isinstance(shape, fx.Node) and (shape.target == "size" or _reads(shape, "shape"))
        return int if of_shape else None
    return int if node.target in SIZES or _reads(node, "ndim") else None


def _reads(node: fx.Node, attribute: str) -> bool:
    return node.target is getattr and node.args[1] == attribute


def _item_key(
    node: fx.Node, found: Mapping[fx.Node, int], sorts: Mapping[fx.Node, type | None]
) -> Hashable | None:
    """What the shape of an item depends on; None where an index may be a tensor, such as a mask."""
    whole, index = node.args
    if not isinstance(whole, fx.Node):
        return None
    if (size := _size_of_part(node)) is not None:
        return found[whole], size
    if any(sorts[each] is not int for each in node.all_input_nodes if each is not whole):
        return None
    return found[whole], elementwise.comparable(_kept_by(index, sorts[whole]), found.__getitem__)


def _kept_by(index: Any, sort: type | None) -> Any:
    """An index of a tensor without what changes no shape: which row or column it takes."""
    several = isinstance(index, tuple)
    parts = index if several else (index,)
    # Nothing but a tensor takes slices, or all that is left, beside numbers.
    if sort is not Tensor and not (
        several and any(p is ... or isinstance(p, slice) for p in parts)
    ):
        return index
    return tuple("one" if type(part) is int else part for part in parts)


def _module_key(module: nn.Module) -> Hashable | None:
    if isinstance(module, Wide):
        return (
            Wide,
            module.kind,
            elementwise.comparable(module.settings),
            tuple(module.widths),
            module.weight.dtype,
        )
    if not elementwise.is_plain(module):
        return None
    cls = plain_class(module)
    layer = kind_of(module, (*KINDS, *NORMS)) is not None
    known = cls in elementwise.ACTIVATIONS or cls in channelwise.SPATIAL_MODULES or cls in SHAPED
    if not layer and not known:
        return None
    weight = held_weight(module) if layer else None
    types = None if weight is None else (weight.dtype, weight.device)
    return cls, elementwise.settings(module), types


def _tensor_key(node: fx.Node) -> Hashable | None:
    """The shape and type of a parameter or buffer."""
    owner: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        owner = getattr(owner, name, None)
    if not isinstance(owner, Tensor):
        return None
    return tuple(owner.shape), owner.dtype, owner.device, owner.stride()


def _function_key(node: fx.Node) -> Hashable | None:
    if node.target is getattr:
        return getattr if node.args[1] in ATTRIBUTES else None
    if hazards.called(node) == "where" and len(node.args) + len(node.kwargs) < 3:
        return None  # It gives the positions of what is not zero.
    known = node.target in elementwise.OPERATORS or node.target in OF_NUMBERS
    known |= node.target in channelwise.SPATIAL_FUNCTIONS
    named = hazards.called(node).removesuffix("_") in NAMES and hazards.of_torch(node.target)
    return node.target if known or named else None


def _size_of_part(node: fx.Node) -> Hashable | None:
    """The size of an item of a split, which is all that tells its shape from the other parts'."""
    split, index = node.args
    if not isinstance(split, fx.Node) or not isinstance(index, int):
        return None
    name = hazards.called(split)
    if name in ("unstack", "unbind"):
        return "stacked"
    sizes = split.args[1] if name == "unsafe_split_with_sizes" else None
    if not isinstance(sizes, (list, tuple)) or not -len(sizes) <= index < len(sizes):
        return None
    return "part", sizes[index]
