"""The layers of an exported program, given back to its graph.

`torch.export` writes a call of a layer as an operation on the input and the parameters. For
looking at siblings it is turned round: where an operation reads the weight, and the bias if there
is one, of one module, that module becomes the layer again and the operation a call of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from conjoin.layers.kind import TENSORS

aten = torch.ops.aten

LAYERS: dict[Any, type[nn.Module]] = {
    aten.linear: nn.Linear,
    aten.conv1d: nn.Conv1d,
    aten.conv2d: nn.Conv2d,
    aten.conv3d: nn.Conv3d,
    aten.conv_transpose1d: nn.ConvTranspose1d,
    aten.conv_transpose2d: nn.ConvTranspose2d,
    aten.conv_transpose3d: nn.ConvTranspose3d,
    aten.embedding: nn.Embedding,
}
"""The layer behind each operation."""

PER_DIMENSION = ("stride", "padding", "output_padding", "dilation")
"""Settings that hold one number for each dimension, or one for all."""


def lift(module: fx.GraphModule) -> fx.GraphModule:
    """Turns operations on the parameters of a layer into calls of the layer.

    Args:
        module: what `ExportedProgram.module()` gives; it is changed in place.

    Returns:
        `module`, in which the layers stand at the names that they had when it was exported. What
        it computes is the same.
    """
    calls: dict[str, tuple[Any, ...]] = {}
    for node in list(module.graph.nodes):
        operation = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or operation not in LAYERS:
            continue
        arguments = _arguments(node)
        name = _owner(module, arguments)
        if not name:
            continue
        settings = _settings(arguments)
        if name not in calls:
            calls[name] = operation, settings
            module.set_submodule(
                name, _layer(LAYERS[operation], module.get_submodule(name), settings)
            )
        if calls[name] != (operation, settings):
            continue
        with module.graph.inserting_before(node):
            call = module.graph.call_module(
                name, (arguments.get("input", arguments.get("indices")),)
            )
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    for node in reversed(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with the defaults of its schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return {**defaults, **given, **node.kwargs}


def _owner(module: fx.GraphModule, arguments: dict[str, Any]) -> str:
    """The module whose weight and bias an operation reads; empty where there is no such module."""
    weight, bias = arguments["weight"], arguments.get("bias")
    if not _reads(weight, ".weight"):
        return ""
    name: str = weight.target.removesuffix(".weight")
    owner = module.get_submodule(name)
    held = {key for key, tensor in owner._parameters.items() if tensor is not None}
    expected = {"weight", "bias"} if bias is not None else {"weight"}
    other = bias is not None and not (_reads(bias, ".bias") and bias.target == f"{name}.bias")
    return "" if other or held != expected or owner._buffers or owner._modules else name


def _reads(node: object, suffix: str) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and str(node.target).endswith(suffix)


def _settings(arguments: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings among an operation's arguments."""
    settings = {k: v for k, v in arguments.items() if k not in ("input", "indices", *TENSORS)}
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in settings.items())


def _layer(
    cls: type[nn.Module], owner: nn.Module, settings: tuple[tuple[str, Any], ...]
) -> nn.Module:
    """A layer of that class with the owner's parameters."""
    held, options = owner._parameters, dict(settings)
    weight = held["weight"]
    assert weight is not None  # _owner looked
    space = tuple(weight.shape[2:])
    for name in PER_DIMENSION:
        if isinstance(options.get(name), tuple) and len(options[name]) == 1:
            options[name] *= len(space)
    if cls is nn.Embedding:
        padding = options.pop("padding_idx")
        options["padding_idx"] = None if padding < 0 else padding
        sizes: tuple[Any, ...] = tuple(weight.shape)
    elif cls is nn.Linear:
        sizes = (weight.shape[1], weight.shape[0])
    elif issubclass(cls, nn.modules.conv._ConvTransposeNd):
        sizes = (weight.shape[0], weight.shape[1] * options["groups"], space)
    else:
        sizes = (weight.shape[1] * options["groups"], weight.shape[0], space)
    if cls is not nn.Embedding:
        options["bias"] = held.get("bias") is not None
    layer = cls(*sizes, **options, device="meta")
    layer._parameters.update(held)
    return layer.train(owner.training)
