"""What must be equal for layers in a graph to run at once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx, nn

from conjoin.graph import edit
from conjoin.layers import GATHERED, Kind, Norm, held_weight, kind_of, norm_of
from conjoin.layers.checks import tensors
from conjoin.layers.embedding import Embedding
from conjoin.layers.equal import common
from conjoin.layers.view import View
from conjoin.merging import Merger


def layer_key(
    node: fx.Node, input: fx.Node, modules: Mapping[str, nn.Module], merger: Merger
) -> tuple[Kind, Hashable] | None:
    """What a layer that reads `input` is; equal for layers that can run at once."""
    if node.op != "call_module" or edit.only_input(node) is not input:
        return None
    layer = modules[str(node.target)]
    kind = merger.kind_of(layer)
    weight = None if kind is None or kind.stacked is None else held_weight(layer)
    if kind is None or weight is None:
        return None
    shape = tuple(weight.shape)
    return kind, (shape, tuple(kind.key(layer).items()))


def table_key(
    node: fx.Node, input: fx.Node, modules: Mapping[str, nn.Module], merger: Merger
) -> tuple[Kind, Hashable] | None:
    """What a table that reads `input` is; equal for those that can run at once.

    Those that are merged go with each other, in any order.
    """
    if node.op != "call_module" or edit.only_input(node) is not input:
        return None
    layer = modules[str(node.target)]
    kind = kind_of(layer, GATHERED)
    if kind not in GATHERED:
        return None
    if isinstance(layer, View):
        return kind, layer.wide_layer.identity
    if not isinstance(kind_of(layer, merger.kinds), Embedding) or not merger.is_free(kind, layer):
        return None
    return kind, tuple(common(kind, layer, tensors(layer)).items())


def norm_key(
    node: fx.Node, input: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[Norm, Hashable] | None:
    """What a normalization with a weight does to `input`; equal for those that can be merged."""
    if node.op != "call_module" or edit.only_input(node) is not input:
        return None
    module = modules[str(node.target)]
    kind = norm_of(module)
    if kind is None or held_weight(module) is None:
        return None
    biased = getattr(module, "bias", None) is not None
    return kind, (module.training, biased, tuple(kind.key(module).items()))
