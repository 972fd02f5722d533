"""A batched product of weights that are kept (out, in), whose gradients come in that layout too.

    y_i = x_i W_i^T + b_i        x: (n, rows, in), W: (n, out, in), b: (n, 1, out)

PyTorch's own gradient of a product of x and W^T is x^T g, so that of W comes transposed: to add it
to W's is a copy across the memory's lines, which with few rows takes longer than the product does.
With few outputs x^T g is slow by itself. So here the gradient of W is g^T x. With few inputs that
is the slow one, the more so the wider W; there it is x^T g, and a weight so small is soon copied.

With one row that is each number of g times each of x, and with one output the gradient of x is each
number of g times each of W: nothing is added up, at which libraries for products are slow
(benchmarks `twin_critics_1` and `twin_critics_256`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from conjoin.layers.lockstep import PLAIN_TENSORS, is_traced

LARGE = 2**14
"""How many elements a weight has at least, or the rows beside few outputs, for that to pay.

A function of one's own takes time in a step of training, too: about what it saves at this size."""

VERY_LARGE = 2**17
"""How many elements the outputs of few inputs have at least, likewise. One product that is not
batched takes less time than a function of one's own and its views do."""

FEW = 8
"""Up to so many outputs x^T g is slow beside g^T x; up to so many inputs it is the other way."""


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in), (out, in) and (out) -> (..., out): as `F.linear`, also in what it refuses."""
    out, width = weight.shape
    few = _is_trained(weight) and width <= FEW and _has_rows(input, weight)
    if few and _is_large(input.numel() // width, out, width) and _is_plain(input):
        rows = input.reshape(1, -1, width)
        biases = None if bias is None else bias.view(1, 1, out)
        made: Tensor = _Product.apply(rows, weight[None], biases)  # type: ignore[no-untyped-call]
        return made.view(*input.shape[:-1], out)
    return F.linear(input, weight, bias)


def _has_rows(input: Tensor, weight: Tensor) -> bool:
    """Whether a plain tensor has rows for a plain weight."""
    plain = all(type(each) in PLAIN_TENSORS for each in (input, weight))
    if not plain or input.layout is not torch.strided or input.dim() == 0:
        return False
    like = input.dtype is weight.dtype and input.device == weight.device
    return like and input.shape[-1] == weight.shape[1] and input.numel() > 0


def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, rows, in), (n, out, in) and (n, 1, out) -> (n, rows, out)."""
    large = _is_trained(weight) and _is_large(rows.shape[1], *weight.shape[1:])
    if large and _is_plain(rows):
        return _Product.apply(rows, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _multiply(rows, weight, bias)


def _is_trained(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled() and not is_compiling()


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    turned = weight.transpose(1, 2)
    return torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias, rows, turned)


def _is_large(number: int, out: int, width: int) -> bool:
    """Whether a gradient of its own pays for a product of so many rows, outputs and inputs."""
    if not isinstance(number, int):  # A symbol, of which nothing may be asked.
        return False
    few_inputs = width <= FEW and number * out >= VERY_LARGE
    return few_inputs or max(out, number if out <= FEW else 0) * width >= LARGE


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
            _times(grad, weight.conj()) if of_rows else None,
            _of_weight(grad, rows.conj()) if of_weight else None,
            grad.sum(1, keepdim=True) if of_bias else None,
        )


def _of_weight(grad: Tensor, rows: Tensor) -> Tensor:
    """(n, rows, out) and (n, rows, in) -> (n, out, in)."""
    if rows.shape[2] <= FEW < grad.shape[2]:
        return _times(rows.transpose(1, 2), grad).transpose(1, 2).contiguous()
    return _times(grad.transpose(1, 2), rows)


def _times(first: Tensor, second: Tensor) -> Tensor:
    """(n, p, k) and (n, k, q) -> (n, p, q)."""
    return first * second if second.shape[1] == 1 else torch.bmm(first, second)
