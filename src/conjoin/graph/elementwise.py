"""Operations on each element by itself, such as activations.

For parts p_i of a tensor W, however it is cut, f(p_i) is the i-th part of f(W).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import edit, hazards
from conjoin.layers.checks import is_hooked
from conjoin.layers.subclass import plain_class

ACTIVATIONS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Tanh,
        nn.Sigmoid,
        nn.LogSigmoid,
        nn.Softplus,
        nn.Softsign,
        nn.Softshrink,
        nn.Hardshrink,
        nn.Tanhshrink,
        nn.Hardtanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Threshold,
        nn.Identity,
    }
)
"""Modules that act element by element, have no parameters and draw no random numbers."""

DROPOUTS: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    }
)
"""Modules that give back what they got, where nothing is to be dropped."""

NAMES = frozenset(
    "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid logsigmoid softplus softsign "
    "softshrink hardshrink tanhshrink hardtanh hardswish hardsigmoid threshold exp exp2 expm1 log "
    "log2 log10 log1p sqrt rsqrt square abs neg negative reciprocal sin cos tan asin acos atan "
    "sinh cosh erf erfc clamp clamp_min clamp_max clip floor ceil round trunc sign add sub mul "
    "div true_divide pow".split()
)
"""Functions and methods that act element by element; the in-place ones have a `_` behind."""

OPERATORS: frozenset[Any] = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.pow,
        operator.neg,
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
    }
)
"""Python's operators that do so too, where the other operand is a number."""

NO_SETTINGS = ("training", "conjoin_index", "conjoin_leads")
"""Plain attributes of modules that are no settings: the mode, and where a view has its part."""

SAVED = frozenset("relu sigmoid tanh exp exp2 expm1 reciprocal rsqrt sqrt tan".split())
"""Those that keep their output for backward, in place or not."""

SAVED_IN_PLACE = frozenset("celu elu leaky_relu selu".split())
"""Those that keep it only where it takes the place of the input."""


def saves_output(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether backward reads what the node gave, so that nobody may change it in between."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        names = {"LeakyReLU": "leaky_relu"}
        name = type(module).__name__
        name, inplace = names.get(name, name.lower()), bool(getattr(module, "inplace", False))
    else:
        called = hazards.called(node)
        name, inplace = called.removesuffix("_"), bool(node.kwargs.get("inplace", False))
        inplace |= called != name
    return (
        name in SAVED or "softmax" in name or name == "pow" or (inplace and name in SAVED_IN_PLACE)
    )


def key(node: fx.Node, input: fx.Node, modules: Mapping[str, nn.Module]) -> Hashable | None:
    """What a node does to `input` element by element; equal for nodes that do the same.

    Args:
        node: a node that reads `input`.
        input: the tensor.
        modules: the modules that the graph calls, by target.

    Returns:
        The operation and its settings; None where it is not known to act element by element.
    """
    if node.op == "call_module":
        if (*node.args, *node.kwargs.values()) != (input,):
            return None
        return module_key(modules[str(node.target)])
    if node.op not in ("call_function", "call_method"):
        return None
    name = hazards.called(node)
    if node.target is F.dropout or name == "dropout":
        return _idle_dropout(node, input)
    known = node.target in OPERATORS or name.removesuffix("_") in NAMES
    if not known or (node.op == "call_function" and not hazards.of_torch(node.target)):
        return None
    return node.op, node.target, *arguments_key(node, input)


def module_key(module: nn.Module) -> Hashable | None:
    """What a module does element by element: its class and settings; None where it does more."""
    cls = plain_class(module)
    if not is_plain(module):
        return None
    if cls in DROPOUTS:
        # In evaluation mode it is idle too, but not for ever.
        idle = getattr(module, "p", None) == 0
        return (nn.Identity, ()) if idle else None
    return (cls, settings(module)) if cls in ACTIVATIONS else None


def is_plain(module: nn.Module) -> bool:
    """Whether a module does what its class does: no hooks, no forward of its own."""
    return not is_hooked(module) and "forward" not in vars(module)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The settings of a module: its attributes but for what it registers, and the mode."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in NO_SETTINGS
    }


def settings(module: nn.Module) -> Hashable:
    """The settings of a module as they can be compared."""
    return comparable(plain_attributes(module))


def arguments_key(node: fx.Node, input: fx.Node) -> tuple[Hashable, Hashable]:
    """The arguments of a node as they can be compared, with a placeholder for `input`.

    A node beside it makes them equal to no others.
    """

    def named(each: fx.Node) -> Hashable:
        return "input" if each is input else object()

    return comparable(node.args, named), comparable(node.kwargs, named)


def comparable(value: Any, named: Callable[[fx.Node], Hashable] = lambda _: object()) -> Hashable:
    """A setting, or an argument, as it can be compared: equal only to what is no other in any way.

    Args:
        value: the setting.
        named: what stands for a node in it; by default what is equal to no other.
    """
    if isinstance(value, fx.Node):
        return fx.Node, named(value)
    if isinstance(value, dict):
        return dict, frozenset((comparable(at), comparable(v, named)) for at, v in value.items())
    if isinstance(value, (tuple, list)):  # As an index, the two are not the same.
        kind = list if isinstance(value, list) else tuple
        return kind, tuple(comparable(item, named) for item in value)
    if isinstance(value, slice):
        return slice, comparable((value.start, value.stop, value.step), named)
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 and -0.0 are two numbers.
    known = value is None or value is ... or isinstance(value, (bool, int, str))
    known |= isinstance(value, (torch.dtype, torch.device, torch.memory_format, torch.layout))
    return (type(value), value) if known else object()


def _idle_dropout(node: fx.Node, input: fx.Node) -> Hashable | None:
    given = edit.arguments(node, ("input", "p", "training", "inplace"))
    idle = given.get("training", True) is False or given.get("p", 0.5) == 0
    return (nn.Identity, ()) if idle and given.get("input") is input else None
