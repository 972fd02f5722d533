"""Makes layers views of one wide layer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from conjoin.layers.checks import tensors
from conjoin.layers.enclosing import mark
from conjoin.layers.kind import Kind
from conjoin.layers.view import view_class
from conjoin.layers.wide import WIDE, Wide


def fuse(
    kind: Kind,
    layers: Sequence[nn.Module],
    enclosing: nn.Module,
    contiguous: frozenset[int] = frozenset(),
    leader: int = 0,
    *,
    together: bool = True,
) -> Wide:
    """Merges layers that were checked to go together; their old storage is given up at once.

    Args:
        kind: the kind that the layers are of.
        layers: two or more; each becomes a view in place.
        enclosing: the smallest module that holds them all.
        contiguous: the positions of the layers whose output is handed out contiguous.
        leader: the position of the layer that comes first among the model's modules.
        together: whether they are called on one tensor, and so can share a run.

    Returns:
        The wide layer.
    """
    wide = Wide(kind, layers, contiguous, together).train(layers[0].training)
    for index, layer in enumerate(layers):
        for name in tensors(layer):
            del layer._parameters[name]
        layer.__class__ = view_class(type(layer))
        layer._modules[WIDE] = wide
        layer.__dict__["conjoin_index"] = index
        layer.__dict__["conjoin_leads"] = index == leader
        wide.lend_running(layer, index)
    mark(enclosing, wide.identity)
    wide.enclosing = weakref.ref(enclosing)
    return wide
