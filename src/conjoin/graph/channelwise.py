"""Operations on each channel by itself, such as pooling, or on each of several equal parts.

For parts p_i of a tensor W that lie side by side along the channels, f(p_i) is the i-th part of
f(W) where f leaves the channels alone: pooling, padding and resizing of what lies behind them, and
normalizing it. What goes along the channels, a softmax or a normalization of the last dimension,
goes along those of each part, of W (..., n, c, ...).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from conjoin.graph import elementwise, hazards

SPATIAL_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        getattr(nn, f"{name}{dimensions}d")
        for name in (
            "MaxPool AvgPool AdaptiveAvgPool AdaptiveMaxPool LPPool ZeroPad ConstantPad "
            "ReflectionPad ReplicationPad CircularPad".split()
        )
        for dimensions in (1, 2, 3)
    }
)
"""Modules that act on the last dimensions only; their name tells how many these are."""

SPATIAL_FUNCTIONS: frozenset[Any] = frozenset(
    {
        getattr(F, f"{name}_pool{dimensions}d")
        for name in ("max", "avg", "adaptive_avg", "adaptive_max")
        for dimensions in (1, 2, 3)
    }
)
"""Functions that do so too."""

SOFTMAX: dict[Any, bool] = {
    nn.Softmax: False,
    nn.LogSoftmax: True,
    F.softmax: False,
    F.log_softmax: True,
    torch.softmax: False,
    torch.log_softmax: True,
    "softmax": False,
    "log_softmax": True,
}
"""Softmax in all its spellings, and whether its logarithm is taken."""

LAST_DIMENSION: dict[Any, bool] = {
    nn.LayerNorm: False,
    nn.RMSNorm: True,
    F.layer_norm: False,
    F.rms_norm: True,
}
"""Normalizations of the last dimensions, and whether they divide by the root mean square only."""

IMAGES: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: -2,
    nn.InstanceNorm2d: -3,
    nn.InstanceNorm3d: -4,
}
"""Normalizations of the space of each channel, and the dimension of the channels."""

MODULES: frozenset[type[nn.Module]] = SPATIAL_MODULES | {
    nn.Softmax,
    nn.LogSoftmax,
    nn.LayerNorm,
    nn.RMSNorm,
    *IMAGES,
}
"""All modules that are known here."""


def key(
    node: fx.Node, part: fx.Node, dim: int | None, modules: Mapping[str, nn.Module]
) -> Hashable | None:
    """What a node does to the space of each channel; equal for nodes that do the same.

    Args:
        node: a node that reads `part`.
        part: a part of a wide tensor.
        dim: the dimension that the parts lie along, counted from the end; None where stacked.
        modules: the modules that the graph calls, by target.

    Returns:
        The operation and its settings; None where it is not known to leave the channels alone.
    """
    if dim is None:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = elementwise.is_plain(module) and (*node.args, *node.kwargs.values()) == (part,)
        known = type(module) in SPATIAL_MODULES and _dimensions(type(module).__name__) == -1 - dim
        if not plain or not known or getattr(module, "return_indices", False):
            return None
        return type(module), elementwise.settings(module)
    if node.op != "call_function" or node.kwargs.get("return_indices", False) is not False:
        return None
    if node.target in SPATIAL_FUNCTIONS:
        name = hazards.called(node)
        # The seventh argument of pooling, if it is given, tells whether indices are wanted.
        known = _dimensions(name) == -1 - dim and len(node.args) < 7
        known &= not (name.startswith("adaptive_max") and len(node.args) > 2)
    elif node.target is F.pad:
        pad = _given(node, 1, "pad", None)
        known = isinstance(pad, (tuple, list)) and len(pad) // 2 <= -1 - dim
    elif node.target in (F.instance_norm, instance_norm_of_images):
        # Of images without a batch, it takes the channels for one.
        weights = ("running_mean", "running_var", "weight", "bias")
        known = dim < -1 and (len(node.args) == 1 or node.target is instance_norm_of_images)
        known &= all(node.kwargs.get(name) is None for name in weights)
        known &= node.kwargs.get("use_input_stats", True) is True
    else:
        known = node.target is F.interpolate and dim < -1
    return (node.target, *elementwise.arguments_key(node, part)) if known else None


def softmax_key(
    node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[int, bool] | None:
    """The dimension of a softmax and whether it is logarithmic; None for any other node."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = elementwise.is_plain(module) and (*node.args, *node.kwargs.values()) == (part,)
        dim = getattr(module, "dim", None)
        if plain and type(module) in SOFTMAX and isinstance(dim, int):
            return dim, SOFTMAX[type(module)]
        return None
    if node.op not in ("call_function", "call_method") or node.target not in SOFTMAX:
        return None
    # A trace of `F.softmax` spells out what was not given.
    given = {
        k: v for k, v in node.kwargs.items() if k != "_stacklevel" and (k, v) != ("dtype", None)
    }
    known = {*given} <= {"dim"} and len(node.args) + len(given) == 2
    dim = _given(node, 1, "dim", None)
    if known and node.args[:1] == (part,) and isinstance(dim, int):
        return dim, SOFTMAX[node.target]
    return None


def layer_norm_key(
    node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[tuple[int, ...], float | None, bool] | None:
    """What a normalization of the last dimension without weights does; None for any other node.

    Returns:
        Its shape of one dimension, its eps, and whether it divides by the root mean square only.
    """
    shape: Any
    eps: Any
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = elementwise.is_plain(module) and (*node.args, *node.kwargs.values()) == (part,)
        if not plain or type(module) not in LAST_DIMENSION or module.elementwise_affine:
            return None
        shape, eps, root_only = module.normalized_shape, module.eps, LAST_DIMENSION[type(module)]
    elif node.op == "call_function" and node.target in LAST_DIMENSION:
        if len(node.args) != 2 or node.args[0] is not part:
            return None
        if any(node.kwargs.get(name) is not None for name in ("weight", "bias")):
            return None
        root_only = LAST_DIMENSION[node.target]
        shape, eps = node.args[1], node.kwargs.get("eps", None if root_only else 1e-5)
    else:
        return None
    known = isinstance(shape, (tuple, list)) and [type(size) for size in shape] == [int]
    if not known or not (eps is None or isinstance(eps, float)):
        return None
    return tuple(shape), eps, root_only


def instance_norm_key(
    node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[int, int, float] | None:
    """What a normalization of images without weights and running statistics does.

    Returns:
        The dimension of the channels, their number and eps; None for any other node.
    """
    if node.op != "call_module" or (*node.args, *node.kwargs.values()) != (part,):
        return None
    module: Any = modules[str(node.target)]
    if type(module) not in IMAGES or not elementwise.is_plain(module):
        return None
    if module.affine or module.track_running_stats or module.running_mean is not None:
        return None
    return IMAGES[type(module)], module.num_features, module.eps


def of_parts(
    node: fx.Node, part: fx.Node, dim: int | None, count: int, modules: Mapping[str, nn.Module]
) -> tuple[Callable[..., Tensor], tuple[Any, ...]] | None:
    """What does to `count` parts what a node does to one of them.

    Returns:
        A function of the whole, and its further arguments; None where it is the node's own.
    """
    if softmax := softmax_key(node, part, modules):
        return softmax_of_parts, (*softmax, count, dim)
    if last := layer_norm_key(node, part, modules):
        return layer_norm_of_parts, (*last, count, dim)
    if images := instance_norm_key(node, part, modules):
        channels, _, eps = images
        return instance_norm_of_images, (channels, eps)
    return None


def softmax_of_parts(
    whole: Tensor, dim: int, logarithmic: bool, count: int, along: int | None
) -> Tensor:
    """The softmax of each of `count` equal parts, put together as they were.

    Args:
        whole: the parts, side by side along `along` or stacked.
        dim: the dimension of the softmax of a part.
        logarithmic: whether the logarithm is wanted.
        count: the number of parts.
        along: the dimension that they lie along, counted from the end; None where stacked.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(
            softmax_of_parts, (whole,), whole, dim, logarithmic, count, along
        )
    function = torch.log_softmax if logarithmic else torch.softmax
    rank = whole.dim() - (along is None)
    if not -rank <= dim < rank:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], "
            f"but got {dim})"
        )
    from_end = dim % rank - rank
    if along is None or from_end != along:
        return function(whole, from_end)
    shape = count, whole.shape[along] // count
    parts: Tensor = torch.unflatten(whole, along, shape)
    return function(parts, along).flatten(along - 1, along)


def layer_norm_of_parts(
    whole: Tensor,
    shape: tuple[int, ...],
    eps: float | None,
    root_only: bool,
    count: int,
    along: int | None,
) -> Tensor:
    """The normalization of the last dimension of each of `count` equal parts.

    Args:
        whole: the parts, side by side along `along` or stacked.
        shape: the last dimension of a part.
        eps: what is added to the mean square.
        root_only: whether it is divided by the root mean square, and the mean not taken off.
        count: the number of parts.
        along: the dimension that they lie along, counted from the end; None where stacked.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(
            layer_norm_of_parts, (whole,), whole, shape, eps, root_only, count, along
        )
    beside = along == -1
    parts: Tensor = whole
    if beside:
        parts = torch.unflatten(whole, -1, (count, whole.shape[-1] // count))
    if root_only:
        normed = F.rms_norm(parts, list(shape), eps=eps)
    else:
        normed = F.layer_norm(parts, list(shape), eps=1e-5 if eps is None else eps)
    return normed.flatten(-2) if beside else normed


def instance_norm_of_images(whole: Tensor, dim: int, eps: float) -> Tensor:
    """The normalization of each channel of images, with a batch or without.

    Args:
        whole: (batch, channels, *space) or (channels, *space).
        dim: the dimension of the channels, counted from the end.
        eps: what is added to the variance.

    Raises:
        ValueError: it has another number of dimensions, or a space of one value.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(instance_norm_of_images, (whole,), whole, dim, eps)
    if whole.dim() not in (-dim, 1 - dim):
        raise ValueError(f"expected {-dim}D or {1 - dim}D input (got {whole.dim()}D input)")
    if whole.dim() == -dim:
        return F.instance_norm(whole.unsqueeze(0), eps=eps).squeeze(0)
    return F.instance_norm(whole, eps=eps)


def _dimensions(name: str) -> int:
    found = re.search(r"([123])d$", name)
    return int(found[1]) if found else 0


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
