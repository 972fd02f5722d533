"""Linear.

x: (..., in), W_i: (out_i, in), b_i: (out_i). The blocks W_i stacked along dimension 0 are the
wide layer's weight: (sum out_i, in), so that y = x W^T + b: (..., sum out_i).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.kind import Kind

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class Linear(Kind):
    """`nn.Linear`."""

    layer = nn.Linear
    settings = ("in_features",)
    bias_on_some = True

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., in) -> (..., sum out_i)."""
        return F.linear(input, wide.weight, self.biases(wide))
