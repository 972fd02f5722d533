"""The kind `Linear`.

x: (..., in), W_i: (out_i, in), b_i: (out_i). The blocks W_i stacked along dimension 0 are the
wide layer's weight: (sum out_i, in), so that y = x W^T + b: (..., sum out_i).

On different inputs x_i, with n equal shapes, the blocks are a stack (n, out, in), and the outputs
are one batched product: y (n, ..., out) = x (n, ..., in) W^T + b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers import batched
from conjoin.layers.kind import Kind

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class Linear(Kind):
    """`nn.Linear`."""

    layer = nn.Linear
    settings = ("in_features",)
    stacked = True
    bias_on_some = True

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., in) -> (..., sum out_i)."""
        return batched.linear(input, wide.weight, self.biases(wide))

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(n, ..., in) -> (n, ..., out)."""
        return _batched(input, wide.weight, self.biases(wide), (len(wide.widths), *wide.shapes[0]))

    def inlined(
        self, wide: Wide, held: str, input: str, name: Callable[[object], str], *, apart: bool
    ) -> str | None:
        """Both, where no zeros fill gaps between biases."""
        if len({*wide.biased}) > 1:
            return None
        weight, bias = f"{held}['weight']", f"{held}['bias']"
        if not apart:
            return f"{name(F.linear)}({input}, {weight}, {bias})"
        count, out, _ = shape = (len(wide.widths), *wide.shapes[0])
        turned = f"{weight}.view({shape}).transpose(1, 2)"
        added = f"{name(torch.baddbmm)}({bias}.view({count}, 1, {out}), {input}, {turned})"
        flat = f"{name(torch.bmm)}({input}, {turned}) if {bias} is None else {added}"
        other = f"{name(_batched)}({input}, {weight}, {bias}, {shape})"
        return f"({other} if {input}.dim() != 3 else {flat})"

    def direct(self, wide: Wide, *, apart: bool = False) -> Callable[[Tensor], Tensor] | None:
        """Both, where no zeros fill gaps between biases."""
        if len({*wide.biased}) > 1:
            return None
        held: dict[str, Any] = wide._parameters
        few = wide.weight.shape[1] <= batched.FEW
        linear = batched.linear if few else F.linear
        shape = (len(wide.widths), *wide.shapes[0])
        if apart:
            return lambda input: _batched(input, held["weight"], held["bias"], shape)
        return lambda input: linear(input, held["weight"], held["bias"])


def _batched(input: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """(n, ..., in), (n * out, in) and (n * out) -> (n, ..., out)."""
    count, out, width = shape
    flat = input.dim() == 3
    rows = input if flat else input.reshape(count, -1, width)
    biases = None if bias is None else bias.view(count, 1, out)
    product = batched.product(rows, weight.view(shape), biases)
    return product if flat else product.view(*input.shape[:-1], out)
