"""The kind `PReLU`, an activation with weights, which follows wide layers.

The i-th branch's tensor x_i: (batch, c_i, *space), its weight (c_i) or (1). Side by side they are
x: (batch, sum c_i, *space). The blocks (c_i) one after another are the weight (sum c_i). Of blocks
(1), each stands for all channels of its branch, so that its gradient is the sum over them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.norm import Norm

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class PReLU(Norm):
    """`nn.PReLU`."""

    layer = nn.PReLU
    settings = ()

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Whether one number stands for all channels."""
        return {**super().key(layer), "single": self.spreads(layer)}

    def spreads(self, layer: nn.Module) -> bool:
        """Whether one number stands for all channels."""
        return cast(Tensor, layer.weight).numel() == 1

    def fits(self, wide: Wide, input: Tensor, dim: int) -> bool:
        """Whether the channels are dimension 1."""
        return input.dim() + dim == 1

    def along(
        self, wide: Wide, input: Tensor, dim: int, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """For branches of these sizes that lie along `dim`, counted from the end."""
        if not wide.settings["single"]:
            return super().along(wide, input, dim, sizes)
        count = len(wide.widths)
        if sizes is None or len({*sizes}) == 1:
            parts: Tensor = torch.unflatten(input, dim, (count, input.shape[dim] // count))
            output = F.prelu(parts.movedim(dim - 1, 1), wide.weight)
            return output.movedim(1, dim - 1).flatten(dim - 1, dim)
        slopes = zip(torch.split(wide.weight, 1), sizes, strict=True)
        weight = torch.cat([slope.expand(size) for slope, size in slopes])
        batched = input.unsqueeze(0)  # So that there is a dimension 1.
        return F.prelu(batched.movedim(dim, 1), weight).movedim(1, dim).squeeze(0)

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """As `nn.PReLU.forward` does."""
        return F.prelu(input, held["weight"])
