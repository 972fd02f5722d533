"""Joins layers along their output channels, and cuts one into several, for `conjoin.nn`.

That is what `Parallel.to_split` and `Split.to_parallel` do, and which layers they do it with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from conjoin.layers.checks import HOOKS


@dataclass(frozen=True)
class Layer:
    """What there is to know of a class of layers."""

    settings: tuple[str, ...]  # must be equal in layers that become one
    width: str  # the attribute with the number of output channels
    weight_dim: int  # where the output channels lie in the weight
    dim: int  # where they lie in the output, counted from the end


_CONV = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_EMBEDDING = (
    "num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
)  # fmt: skip

_KINDS: dict[type[nn.Module], Layer] = {
    nn.Linear: Layer(("in_features",), "out_features", 0, -1),
    nn.Conv1d: Layer(_CONV, "out_channels", 0, -2),
    nn.Conv2d: Layer(_CONV, "out_channels", 0, -3),
    nn.Conv3d: Layer(_CONV, "out_channels", 0, -4),
    nn.ConvTranspose1d: Layer((*_CONV, "output_padding"), "out_channels", 1, -2),
    nn.ConvTranspose2d: Layer((*_CONV, "output_padding"), "out_channels", 1, -3),
    nn.ConvTranspose3d: Layer((*_CONV, "output_padding"), "out_channels", 1, -4),
    nn.Embedding: Layer(_EMBEDDING, "embedding_dim", 1, -1),
}

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _runs_forward_of(module: nn.Module, classes: Iterable[type[nn.Module]]) -> bool:
    if "forward" in vars(module):
        return False
    return any(type(module).forward is kind.forward for kind in classes)


def leaves_its_output_alone(module: nn.Module) -> bool:
    """Whether the module's backward does not read its output.

    Only then is `unsafe_split` exact: it lets a part be changed in place, unseen by autograd.
    """
    if getattr(module, "_forward_hooks", None):
        return False
    return _runs_forward_of(module, (*_KINDS, *_BATCH_NORMS))


def known_width(module: nn.Module, dim: int) -> int | None:
    """The number of output channels, where they are known to lie along `dim`."""
    for layer, kind in _KINDS.items():
        if not _runs_forward_of(module, [layer]):
            continue
        is_batched_conv = kind.width == "out_channels" and dim == 1
        return getattr(module, kind.width) if dim == kind.dim or is_batched_conv else None
    return None


def is_channel_dim(kind: Layer, dim: int, ndim: int | None) -> bool:
    """Whether the output channels are known to lie along `dim`, of `ndim` dimensions."""
    if dim < 0:
        return dim == kind.dim
    if ndim is not None:
        return dim == ndim + kind.dim
    return kind.width == "out_channels" and dim == 1


def check_container(where: str, module: nn.Module, base: type[nn.Module]) -> None:
    """Raises where a container does more than its class says."""
    if not _runs_forward_of(module, [base]):
        raise ValueError(
            f"{where} cannot convert {type(module).__name__}: its forward is its own. Convert a "
            f"plain {base.__name__}, which conjoin.unfuse makes of an optimized one, and do the "
            "rest in a module around it."
        )
    if _has_hooks(module):
        raise ValueError(f"{where} would lose the hooks of this module. Remove them first.")


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)


def check_joinable(where: str, layers: list[tuple[str, nn.Module]]) -> Layer:
    """Returns the kind that all layers are of; raises where they cannot be parts of one layer."""
    if not layers:
        raise ValueError(f"{where} needs at least one branch, and there is none. Append one first.")
    for name, layer in layers:
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise ValueError(f"{where} cannot use {name!r} ({type(layer).__name__}): {obstacle}.")
    first_name, first = layers[0]
    for name, layer in layers[1:]:
        difference = _difference(first, layer)
        if difference is not None:
            raise ValueError(
                f"{where} cannot make one layer of {first_name!r} and {name!r}: {difference}."
            )
    parameters = [id(p) for _, layer in layers for p in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            f"{where} cannot copy a parameter that several branches share. Give each its own first."
        )
    return _KINDS[type(first)]


def _obstacle(layer: nn.Module) -> str | None:
    """What keeps this layer from being, or being a part of, a wide layer."""
    if parametrize.is_parametrized(layer):
        return "it is parametrized; remove the parametrization first"
    if type(layer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        return f"only layers of exactly these classes can be joined or cut: {known}"
    if "forward" in vars(layer):
        return "its forward was replaced; restore it first"
    if _has_hooks(layer):
        return "it has hooks, which would be lost; remove them first"
    if getattr(layer, "groups", 1) > 1:
        return f"groups={layer.groups}, and only groups=1 can be joined or cut"
    if getattr(layer, "max_norm", None) is not None:
        return f"max_norm={layer.max_norm}, a limit on whole rows, which another width changes"
    if any(name not in ("weight", "bias") for name, _ in layer.named_parameters()):
        return "it has parameters of its own besides weight and bias"
    if layer._buffers or layer._modules:
        return "it has buffers or modules of its own"
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}, not a plain Parameter"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"its {name} has hooks, which would be lost; remove them first"
    return None


def _difference(first: nn.Module, other: nn.Module) -> str | None:
    """What keeps two layers, each fit by itself, from being one."""
    if type(first) is not type(other):
        return f"they are a {type(first).__name__} and a {type(other).__name__}"
    for name in _KINDS[type(first)].settings:
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            return f"{name} is {one!r} in the first and {two!r} in the second"
    ours, theirs = dict(first.named_parameters()), dict(other.named_parameters())
    if set(ours) != set(theirs):
        return "one has a bias and the other has none"
    for name, parameter in ours.items():
        for what in ("dtype", "device", "requires_grad"):
            one, two = getattr(parameter, what), getattr(theirs[name], what)
            if one != two:
                return f"{what} of {name} is {one} in the first and {two} in the second"
    return None


def join(layers: list[nn.Module], kind: Layer) -> nn.Module:
    """One layer with copies of the parameters of several, side by side."""
    width = sum(getattr(layer, kind.width) for layer in layers)
    weight = torch.cat(
        [layer.get_parameter("weight").detach() for layer in layers], kind.weight_dim
    )
    if getattr(layers[0], "bias", None) is None:
        return _like(layers[0], kind, width, weight, None)
    bias = torch.cat([layer.get_parameter("bias").detach() for layer in layers])
    return _like(layers[0], kind, width, weight, bias)


def cut(layer: nn.Module, kind: Layer, sizes: list[int]) -> list[nn.Module]:
    """Layers of so many output channels, with copies of the parameters of one."""
    weights = torch.split(layer.get_parameter("weight").detach(), sizes, kind.weight_dim)
    if getattr(layer, "bias", None) is None:
        return [
            _like(layer, kind, size, weight.clone(), None)
            for size, weight in zip(sizes, weights, strict=True)
        ]
    biases = torch.split(layer.get_parameter("bias").detach(), sizes)
    return [
        _like(layer, kind, size, weight.clone(), bias.clone())
        for size, weight, bias in zip(sizes, weights, biases, strict=True)
    ]


def _like(
    layer: nn.Module, kind: Layer, width: int, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    """A layer with the settings of `layer`, `width` output channels and these very values."""
    settings = {name: getattr(layer, name) for name in kind.settings}
    settings[kind.width] = width
    if not isinstance(layer, nn.Embedding):
        settings["bias"] = bias is not None
    # On the meta device nothing is drawn from the random stream, which stays the user's.
    new = type(layer)(**settings, device="meta").train(layer.training)
    for name, value in [("weight", weight), ("bias", bias)]:
        if value is not None:
            learns = layer.get_parameter(name).requires_grad
            setattr(new, name, nn.Parameter(value, requires_grad=learns))
    return new
