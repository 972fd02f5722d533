"""Finds the layers in a graph of ATen operations, and puts calls of them there.

`torch.export` writes a call of a layer as an operation on the input and the parameters. For the
passes it is turned round: where an operation reads the weight, and the bias if there is one, of one
module, that module becomes the layer again and the operation a call of it. What the passes know
under another name, such as `torch.cat`, gets that name. All else stays: most operations have the
name of a method, and are known by that.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from conjoin.graph import edit
from conjoin.graph.meta import VALUE
from conjoin.layers.checks import TENSORS
from conjoin.layers.owner import Held
from conjoin.tracing import decomposed
from conjoin.tracing.decomposed import LayerCall

aten = torch.ops.aten

LAYERS: Mapping[Any, type[nn.Module]] = {
    aten.linear: nn.Linear,
    aten.conv1d: nn.Conv1d,
    aten.conv2d: nn.Conv2d,
    aten.conv3d: nn.Conv3d,
    aten.conv_transpose1d: nn.ConvTranspose1d,
    aten.conv_transpose2d: nn.ConvTranspose2d,
    aten.conv_transpose3d: nn.ConvTranspose3d,
    aten.embedding: nn.Embedding,
    aten.group_norm: nn.GroupNorm,
    aten.layer_norm: nn.LayerNorm,
    aten.rms_norm: nn.RMSNorm,
    aten.prelu: nn.PReLU,
}
"""The layer behind each operation."""

OF_TORCH: Mapping[Any, Any] = {
    F.linear: aten.linear.default,
    torch.conv1d: aten.conv1d.default,
    torch.conv2d: aten.conv2d.default,
    torch.conv3d: aten.conv3d.default,
    torch.conv_transpose1d: aten.conv_transpose1d.default,
    torch.conv_transpose2d: aten.conv_transpose2d.input,
    torch.conv_transpose3d: aten.conv_transpose3d.input,
    F.layer_norm: aten.layer_norm.default,
}
"""The operation behind a function that has the same arguments in the same order."""

TRACKING: Mapping[Any, Mapping[int, type[nn.Module]]] = {
    aten.batch_norm: {
        2: nn.BatchNorm1d,
        3: nn.BatchNorm1d,
        4: nn.BatchNorm2d,
        5: nn.BatchNorm3d,
    },
    aten.instance_norm: {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d},
}
"""The normalization behind an operation, by the number of its input's dimensions."""

RUNNING = ("running_mean", "running_var")
"""The buffers that such a normalization reads."""

COUNTER = "num_batches_tracked"
"""The buffer in which it counts its calls in training."""

HOLDERS = (nn.Module, Held)
"""The classes of modules that only hold tensors; one of the user's own may do more."""

INPUTS = ("input", "indices", "self")
"""The names that operations have for what a layer reads."""

OF_BACKENDS = ("cudnn_enabled", "cudnn_enable")
"""Arguments that say how something is computed, not what."""

PER_DIMENSION = ("stride", "padding", "output_padding", "dilation")
"""Settings that hold one number for each dimension, or one for all."""

FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    aten.cat.default: torch.cat,
    aten.stack.default: torch.stack,
    aten.split.Tensor: torch.split,
    aten.split.sizes: torch.split,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.chunk.default: torch.chunk,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.matmul.default: torch.matmul,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.einsum.default: torch.einsum,
    **{operation: function for function, operation in OF_TORCH.items()},
    aten.softmax.int: torch.softmax,
    aten.log_softmax.int: torch.log_softmax,
    aten.pad.default: F.pad,
    **{
        getattr(aten, f"{name}_pool{dimensions}d").default: getattr(F, f"{name}_pool{dimensions}d")
        for name in ("max", "avg", "adaptive_avg")
        for dimensions in (1, 2, 3)
    },
}
"""The passes' name for an operation with the same arguments."""

COMPOSED: Mapping[Any, Callable[..., Any]] = {
    aten.linear: F.linear,
    aten.max_pool2d: F.max_pool2d,
    aten.max_pool3d: F.max_pool3d,
    aten.silu: F.silu,
}
"""The passes' name for what may be written as several operations."""

OPERATORS: Mapping[Any, Callable[..., Any]] = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.neg.default: operator.neg,
}
"""Python's operator for an operation without options."""

Origins = dict[fx.Node, tuple[fx.Node, ...]]
"""For each node that was made, the nodes that it stands for, the one that gave its value last."""

OF_A_MODE = (aten.batch_norm, aten.instance_norm)
"""Operations of layers in which it is written whether they are in training mode."""


def lift(module: fx.GraphModule) -> fx.GraphModule:
    """Turns operations on the parameters of a layer into calls of the layer.

    Args:
        module: a graph in which ATen operations read the module's parameters, such as
            `ExportedProgram.module()` gives; it is changed in place.

    Returns:
        `module`, in which the layers stand at the names that they had when it was exported. What
        it computes is the same.
    """
    raise_(module)
    edit.erase_unread(module.graph, [node for node in module.graph.nodes if node.op == "get_attr"])
    module.recompile()
    return module


def raise_(module: fx.GraphModule, *, fixed: bool = True) -> Origins:
    """What `lift` does, but for taking out what is read no more.

    Args:
        module: the graph.
        fixed: whether its modules stay in the mode that it was exported in. Where somebody may set
            another, which the operations do not follow, those that depend on it stay what they are.

    Returns:
        What the new nodes stand for; these nodes are in the graph no more.
    """
    origins: Origins = {}
    calls: dict[str, tuple[Any, ...]] = {}
    counts = _counts(module)
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        written = _written(node)
        if not fixed and written.operation in OF_A_MODE:
            continue
        gone = written.nodes
        with module.graph.inserting_before(node):
            if name := _called_layer(module, written, calls, counts):
                made = module.graph.call_module(name, (_input(written.arguments),))
            elif function := _composed(written):
                made = module.graph.call_function(function, (*written.arguments.values(),))
            elif found := _function(node):
                made, gone = module.graph.call_function(*found), (node,)
            else:
                continue
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        counting = counts[name].pop(0) if name and _trains(node) else None
        origins[made] = gone
        if counting is not None:  # The next call counts from there.
            counting.replace_all_uses_with(counting.all_input_nodes[0])
            origins[made] = (counting, *origins[made])
        for each in reversed(origins[made]):
            module.graph.erase_node(each)
    return origins


def _written(node: fx.Node) -> LayerCall:
    """The call of a layer that an operation may be."""
    found = decomposed.read(node, arguments_by_schema)
    if found is not None:
        return found
    operation = getattr(OF_TORCH.get(node.target, node.target), "overloadpacket", None)
    known = operation in LAYERS or operation in TRACKING
    return LayerCall(operation, arguments_by_schema(node) if known else {}, (node,))


def _composed(written: LayerCall) -> Callable[..., Any] | None:
    """The function that several operations are; None where they are none, or a layer's.

    A product is no layer's where its weight was computed, such as a slice.
    """
    if len(written.nodes) == 1 or written.operation not in COMPOSED:
        return None
    weight, bias = (written.arguments.get(name) for name in TENSORS)
    if _reads(weight, "") or (isinstance(bias, fx.Node) and _rank(bias) != 1):
        return None
    return COMPOSED[written.operation]


def _function(node: fx.Node) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The function that the passes know an operation as, and its arguments."""
    if node.target in OPERATORS:
        return None if node.kwargs else (OPERATORS[node.target], node.args, {})
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        given = arguments_by_schema(node)
        if given["weight"] is not None or given.get("bias") is not None:
            return None
        function = F.layer_norm if "bias" in given else F.rms_norm
        return function, (given["input"], given["normalized_shape"]), {"eps": given["eps"]}
    if node.target is aten.embedding.default:
        given = arguments_by_schema(node)
        padding = given.pop("padding_idx")
        inputs = given.pop("indices"), given.pop("weight")
        return F.embedding, inputs, {"padding_idx": None if padding < 0 else padding, **given}
    if node.target in FUNCTIONS:
        return FUNCTIONS[node.target], node.args, dict(node.kwargs)
    found = decomposed.function(node, arguments_by_schema)
    return found and (*found, {})


def _called_layer(
    module: fx.GraphModule,
    written: LayerCall,
    calls: dict[str, tuple[Any, ...]],
    counts: Mapping[str, list[fx.Node]],
) -> str:
    """The layer that operations are a call of, which is made if it is the first one.

    Returns:
        Its name; empty where they are none, or have other settings than the first.
    """
    operation, given, node = written.operation, written.arguments, written.nodes[-1]
    cls = LAYERS.get(operation) or TRACKING.get(operation, {}).get(_rank(node))
    if cls is None:
        return ""
    name = _owner(module, given)
    if not name or (_trains(node) and not counts.get(name)):
        return ""
    settings = _settings(given)
    if name not in calls and type(module.get_submodule(name)) not in HOLDERS:
        return ""
    if name not in calls:
        calls[name] = operation, settings
        module.set_submodule(name, _layer(cls, module.get_submodule(name), settings))
    return name if calls[name] == (operation, settings) else ""


def _rank(node: fx.Node) -> int:
    """The number of dimensions of a node's value; 0 where it is not known."""
    value = node.meta.get(VALUE)
    return value.dim() if isinstance(value, Tensor) else 0


def _trains(node: fx.Node) -> bool:
    """Whether a node is a BatchNorm in training, which counts its calls."""
    return node.target is aten.batch_norm.default and bool(arguments_by_schema(node)["training"])


def _counts(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The counting of each call of a BatchNorm in training, by its name; none for any other."""
    counting: dict[str, list[fx.Node]] = {}
    running: Counter[str] = Counter()
    read: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith(f".{COUNTER}"):
            name = str(node.target).removesuffix(f".{COUNTER}")
            while len(node.users) == 1 and _counts_one(next(iter(node.users)), node):
                node = next(iter(node.users))
                counting.setdefault(name, []).append(node)
            read |= {name} if node.users else set()
        elif node.op == "call_function" and _trains(node):
            weight = getattr(arguments_by_schema(node)["weight"], "target", "")
            running[str(weight).removesuffix(".weight")] += 1
    return {
        name: sorted(nodes)
        for name, nodes in counting.items()
        if len(nodes) == running[name] and name not in read
    }


def _counts_one(node: fx.Node, counter: fx.Node) -> bool:
    return node.target is aten.add_.Tensor and node.args == (counter, 1) and not node.kwargs


def arguments_by_schema(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, with the defaults of its schema, in its order."""
    schema = OF_TORCH.get(node.target, node.target)._schema
    given = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)}
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    known = {**defaults, **given, **node.kwargs}
    return {a.name: known[a.name] for a in schema.arguments if a.name in known}


def _input(arguments: Mapping[str, Any]) -> fx.Node:
    """What a layer reads, among its operation's arguments."""
    found: fx.Node = next(arguments[name] for name in INPUTS if name in arguments)
    return found


def _owner(module: fx.GraphModule, arguments: Mapping[str, Any]) -> str:
    """The module whose tensors an operation reads; empty where there is no such module."""
    weight = arguments["weight"]
    if not _reads(weight, ".weight"):
        return ""
    name: str = weight.target.removesuffix(".weight")
    owner = module.get_submodule(name)
    expected = {key for key in (*TENSORS, *RUNNING) if arguments.get(key) is not None}
    if not all(_reads(arguments[key], f"{name}.{key}", whole=True) for key in expected):
        return ""
    if not expected.isdisjoint(RUNNING):
        expected.add(COUNTER)
    held = {
        key for key, t in (*owner._parameters.items(), *owner._buffers.items()) if t is not None
    }
    return name if held == expected and not owner._modules else ""


def _reads(node: object, name: str, *, whole: bool = False) -> bool:
    """Whether a node reads an attribute of a name, or of one that ends like this."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return False
    return node.target == name if whole else str(node.target).endswith(name)


def _settings(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The settings among an operation's arguments."""
    other = (*INPUTS, *TENSORS, *RUNNING, *OF_BACKENDS)
    settings = {k: v for k, v in arguments.items() if k not in other}
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in settings.items())


def _layer(
    cls: type[nn.Module], owner: nn.Module, settings: tuple[tuple[str, Any], ...]
) -> nn.Module:
    """A layer of that class with what the owner holds."""
    held, options = owner._parameters, dict(settings)
    weight = held["weight"]
    assert weight is not None  # _owner looked
    space = tuple(weight.shape[2:])
    for name in PER_DIMENSION:
        if isinstance(options.get(name), tuple) and len(options[name]) == 1:
            options[name] *= len(space)
    training = bool(options.pop("training", owner.training))
    sizes: tuple[Any, ...]
    if cls is nn.Embedding:
        padding = options.pop("padding_idx")
        options["padding_idx"] = None if padding < 0 else padding
        sizes = tuple(weight.shape)
    elif cls is nn.Linear:
        sizes = (weight.shape[1], weight.shape[0])
    elif cls in (nn.LayerNorm, nn.RMSNorm):
        sizes = (options.pop("normalized_shape"),)
    elif cls is nn.GroupNorm:
        sizes = (options.pop("num_groups"), weight.shape[0])
    elif issubclass(cls, nn.modules.conv._ConvTransposeNd):
        sizes = (weight.shape[0], weight.shape[1] * options["groups"], space)
    elif issubclass(cls, nn.modules.conv._ConvNd):
        sizes = (weight.shape[1] * options["groups"], weight.shape[0], space)
    else:
        sizes = (weight.shape[0],)
    if cls in (nn.Linear, nn.LayerNorm) or issubclass(cls, nn.modules.conv._ConvNd):
        options["bias"] = held.get("bias") is not None
    elif issubclass(cls, nn.modules.batchnorm._NormBase):
        tracked = owner._buffers.get(COUNTER) is not None
        training = bool(options.pop("use_input_stats", training)) and tracked
        options.update(affine=True, track_running_stats=tracked)
    layer = cls(*sizes, **options, device="meta")
    layer._parameters.update(held)
    layer._buffers.update(owner._buffers)
    beside = {name: value for name, value in vars(owner).items() if name not in vars(layer)}
    vars(layer).update(beside)  # Such as constants of the program, which its graph may read.
    return layer.train(training)
