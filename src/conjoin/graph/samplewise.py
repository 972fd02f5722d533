"""Layers that act on each sample by itself, so that one call on a stack equals several calls.

For tensors p_i of one shape, stacked as W (n, ...), f(p_i) is the i-th part of f(W), with the same
weights for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from conjoin.graph import edit, elementwise, hazards
from conjoin.layers import kind_of
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View

NORMS: frozenset[type[nn.Module]] = frozenset({nn.LayerNorm, nn.RMSNorm})
"""Normalizations of the last dimensions."""

LAYERS: frozenset[type[nn.Module]] = frozenset({nn.Linear, nn.Embedding})
"""Kinds of layer that know no batch.

A convolution does; on a CPU, one of a larger batch takes as long as several, or longer.
"""


def key(node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The layer that acts on each sample in `part`.

    Args:
        node: a node that reads `part`.
        part: the tensor.
        modules: the modules that the graph calls, by target.

    Returns:
        None where the node calls no layer that is known here.
    """
    if node.op != "call_module" or edit.only_input(node) is not part:
        return None
    module = modules[str(node.target)]
    return module if is_samplewise(module) else None


def is_samplewise(module: nn.Module) -> bool:
    """Whether a module is a layer that acts on each sample by itself, and does nothing else."""
    if hazards.is_opaque(module) or not elementwise.is_plain(module):
        return False
    cls = plain_class(module)
    if cls in NORMS:  # Of more dimensions, it would not raise for a tensor that has too few.
        return len(module.normalized_shape) == 1  # type: ignore[arg-type]
    kind = kind_of(module) if cls in LAYERS else None
    return kind is not None and (isinstance(module, View) or kind.check(module) is None)


def dims(module: nn.Module) -> int:
    """How many dimensions the input of a layer has at least."""
    return 0 if isinstance(module, nn.Embedding) else 1


def growth(module: nn.Module) -> int:
    """How many times as many elements as a layer's input its output has, rounded up."""
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return 1
    if isinstance(module, nn.Embedding):
        return weight.shape[1]
    return -(-weight.shape[0] // weight.shape[1])


def trains(module: nn.Module) -> bool:
    """Whether what a layer gives requires a gradient whatever it reads."""
    return any(parameter.requires_grad for parameter in module.parameters())
