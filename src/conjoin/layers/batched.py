"""A batched product of weights that are kept (out, in), whose gradients come in that layout too.

    y_i = x_i W_i^T + b_i        x: (n, rows, in), W: (n, out, in), b: (n, 1, out)

PyTorch's own gradient of a product of x and W^T is x^T g, so that of W comes transposed: to add it
to W's is a copy across the memory's lines, which with few rows takes longer than the product does.
With few outputs x^T g is slow by itself. So here the gradient of W is g^T x.

With one row that is each number of g times each of x, at which libraries for products are slow
(benchmark `twin_critics_1`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from conjoin.layers.lockstep import is_traced

LARGE = 2**14
"""How many elements a weight has at least, or the rows beside few outputs, for that to pay.

A function of one's own takes time in a step of training, too: about what it saves at this size."""

FEW = 8
"""Up to so many outputs x^T g is slow beside g^T x."""


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, rows, in), (n, out, in) and (n, 1, out) -> (n, rows, out)."""
    trained = weight.requires_grad and torch.is_grad_enabled() and not is_compiling()
    if not (trained and _is_large(rows, weight)):
        return _multiply(rows, weight, bias)
    if _is_plain(rows):
        return _Product.apply(rows, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _multiply(rows, weight, bias)


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    turned = weight.transpose(1, 2)
    return torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias, rows, turned)


def _is_large(rows: Tensor, weight: Tensor) -> bool:
    number = rows.shape[1]
    if not isinstance(number, int):  # A symbol, of which nothing may be asked.
        return False
    _, out, width = weight.shape
    return max(out, number if out <= FEW else 0) * width >= LARGE


def _is_plain(rows: Tensor) -> bool:
    """Whether nothing looks into the product or changes it."""
    return not torch.is_autocast_enabled(rows.device.type) and not is_traced()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As in PyTorch, where rows need no gradient the weight may change before the backward pass.
        ctx.save_for_backward(rows, weight if ctx.needs_input_grad[0] else None)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (rows, weight) = grads, ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight.conj()) if of_rows else None,
            _of_weight(grad.transpose(1, 2), rows.conj()) if of_weight else None,
            grad.sum(1, keepdim=True) if of_bias else None,
        )


def _of_weight(columns: Tensor, rows: Tensor) -> Tensor:
    """(n, out, rows) and (n, rows, in) -> (n, out, in)."""
    return columns * rows if rows.shape[1] == 1 else torch.bmm(columns, rows)
