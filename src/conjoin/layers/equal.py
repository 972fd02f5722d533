"""What must be equal among siblings, of any kind, for one layer to stand for all."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conjoin.layers.kind import Kind, memory_format

OF_BIAS = ("bias", "_bias")
"""Whether there is a bias, and what somebody has set on it."""


def common(kind: Kind, layer: nn.Module, held: Mapping[str, nn.Parameter]) -> dict[str, object]:
    """All that must be equal among siblings, the kind's own key included.

    Args:
        kind: the kind of the layer.
        layer: the layer.
        held: the Parameters that hold its `weight` and `bias`.
    """
    found: dict[str, object] = dict(kind.key(layer))
    found["bias"] = "bias" in held
    for attribute in ("dtype", "device", "requires_grad"):
        values = {name: getattr(tensor, attribute) for name, tensor in held.items()}
        uniform = len(set(values.values())) == 1
        found[attribute] = next(iter(values.values())) if uniform else tuple(values.items())
    # Any other order than these is lost in a wide weight, and counts as contiguous.
    format = memory_format(held["weight"])
    found["memory_format"] = "contiguous" if format == "strided" else format
    weight: Any = layer.weight
    found["_shape"] = (*weight.shape[: kind.weight_dim], *weight.shape[kind.weight_dim + 1 :])
    found["attributes"] = _attributes(held["weight"])
    found["_bias"] = _attributes(held.get("bias"))
    return found


def but_bias(key: Mapping[str, object]) -> Hashable:
    """Of what must be equal, all that does not concern the bias."""
    return tuple(item for item in key.items() if item[0] not in OF_BIAS)


def may_lack_bias(keys: Sequence[Mapping[str, object]]) -> bool:
    """Whether layers go together of which some may have no bias; those that have one are alike."""
    biases = {key["_bias"] for key in keys if key["bias"]}
    return len(biases) < 2 and len({but_bias(key) for key in keys}) == 1


def _attributes(tensor: Tensor | None) -> Hashable:
    """The attributes that somebody has set on a Parameter."""
    if tensor is None or isinstance(tensor, FakeTensor):  # Its attributes are its own affair.
        return ()
    return tuple((attribute, id(value)) for attribute, value in vars(tensor).items())
