"""What models that are written wide by hand are made of: the weights of given layers in one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Layer = TypeVar("Layer", bound=nn.Module)


def joined(layers: Iterable[nn.Module], layer: Layer, dim: int = 0) -> Layer:
    """`layer` with the weights of `layers` one after another along `dim`."""
    states = [each.state_dict() for each in layers]
    layer.to(next(iter(states[0].values())))
    for name, tensor in layer.state_dict().items():
        if tensor.dim():  # Not the number of batches that a norm has seen.
            tensor.copy_(torch.cat([state[name] for state in states], dim))
    return layer


class Stacked(nn.Module):
    """n layers `Linear` on n tensors: x (n, batch, in) -> (n, batch, out)."""

    def __init__(self, layers: Iterable[nn.Linear]) -> None:
        super().__init__()
        layers = list(layers)
        self.weight = nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.detach()[None] for layer in layers]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.transpose(1, 2))


def apart(x: Tensor, count: int) -> Tensor:
    """(batch, n * width), side by side, -> (n, batch, width), a stack."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)
