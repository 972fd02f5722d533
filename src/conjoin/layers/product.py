"""The kinds of product with a module's own Parameters, such as `x @ self.w`.

    linear    y_i = x W_i^T + b_i     W_i: (out_i, in)     F.linear(x, self.w), x @ self.w.t()
    matmul    y_i = x W_i + b_i       W_i: (in, out)       x @ self.w, and what is written otherwise

x: (..., in). A `Product` is such a Parameter as a layer, see `owner.py`. The blocks (out_i, in) one
below the other are the weight of one wide product. Blocks (in, out) would have to lie side by
side, where a checkpoint could not hold them as plain tensors, so they are a stack (n, in, out), and
x is multiplied with all of it in one batched product: y (n, ..., out). The parts of y are
contiguous; so the blocks of an F.linear are taken as a stack too where something depends on that.

Blocks (in, out_i) of different widths stay apart: to join them is a copy of all weights at each
call. So do weights of three dimensions, as stacks of experts have: two of them on one x would read
x twice, one copy beside the other, and so launch no less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.embedding import unstack
from conjoin.layers.kind import Kind
from conjoin.layers.view import View

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide

SUFFIX = "__product"
"""What a product's name has behind that of its weight."""


class ProductView(View):
    """A product after fusing; the module whose Parameters it holds saves, loads and lists them."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the wide layer."""
        return nn.Module.named_parameters(self, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the owner's loading writes through."""


class Product(nn.Module):
    """Parameters of another module, and the product that they are read in, as a layer.

    Attributes:
        function: the name of the function.
        equation: for `einsum`, its equation; for `tensordot`, a number of dimensions, if given.
        stacked: whether siblings are multiplied as a stack.
        given: for a convolution, its settings by name.
    """

    conjoin_view = ProductView
    given: Mapping[str, Any] = MappingProxyType({})
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        function: str,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        equation: str = "",
        *,
        stacked: bool = True,
    ) -> None:
        """Takes the Parameters as they are."""
        super().__init__()
        self.function, self.equation, self.stacked = function, equation, stacked
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)

    def written(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product as it was written, of these; `fx.Proxy` objects write it into a graph."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The product of the input and the Parameters, as it was written."""
        return self.written(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The shape of the weight."""
        return f"weight={tuple(_held(self).shape)}"

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: the owner emits the Parameters."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the owner's loading writes through."""


class Matmul(Product):
    """The product with a weight (in, out)."""

    def written(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in), (in, out) and (out) -> (..., out)."""
        return _multiply(self.function, self.equation, input, weight, bias)


class LinearProduct(Product):
    """The product with a weight (out, in): `F.linear`, or one with its transpose."""

    def written(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in), (out, in) and (out) -> (..., out)."""
        return _linear(self.function, self.equation, input, weight, bias)


class OfMatmul(Kind):
    """`x @ self.w`, `torch.mm`, `torch.addmm`, `torch.tensordot` and `torch.einsum`."""

    layer = Matmul
    settings = ("function", "equation")
    weight_dim = 1

    @property
    def name(self) -> str:
        """The name that reports show."""
        return "matmul"

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the width, since a stack has one for all."""
        return {**super().key(layer), "out_features": _held(layer).shape[1]}

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., in) -> (n, ..., out)."""
        return _at_once(self, wide, input, _multiply)

    def split(self, wide: Wide) -> tuple[Callable[..., Sequence[Tensor]], tuple[Any, ...]]:
        """Along the stack."""
        return unstack, (len(wide.widths),)


class OfLinear(Kind):
    """`F.linear`, and `x @ self.w.t()`."""

    layer = LinearProduct
    settings = ("function", "equation", "stacked")
    bias_on_some = True

    @property
    def name(self) -> str:
        """The name that reports show."""
        return "linear"

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the width where the siblings are a stack, which has one for all."""
        width = {"out_features": _held(layer).shape[0]} if layer.stacked else {}
        return {**super().key(layer), **width}

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., in) -> (n, ..., out) for a stack, (..., sum out_i) otherwise."""
        settings: dict[str, Any] = wide.settings
        function, equation = settings["function"], settings["equation"]
        if settings["stacked"]:
            return _at_once(self, wide, input, _linear)
        return _linear(function, equation, input, wide.weight, self.biases(wide))

    def split(self, wide: Wide) -> tuple[Callable[..., Sequence[Tensor]], tuple[Any, ...]]:
        """Along the stack for a stack, along the channels otherwise."""
        return (unstack, (len(wide.widths),)) if wide.settings["stacked"] else super().split(wide)


KINDS: tuple[Kind, ...] = (OfMatmul(), OfLinear())
"""The kinds of product of matrices."""


def _held(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


Compute = Callable[[str, str, Tensor, Tensor, "Tensor | None"], Tensor]
"""A product as it was written, of a function, an equation, the input, the weight and the bias."""


def _multiply(
    function: str, equation: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The product with a weight (in, out) as it was written."""
    if function == "einsum":
        return torch.einsum(equation, input, weight)
    if function == "tensordot":
        dims: Any = 1 if equation else ([-1], [0])
        return cast(Tensor, torch.tensordot(input, weight, dims=dims))
    if bias is not None:
        return torch.addmm(bias, input, weight)
    return torch.mm(input, weight) if function == "mm" else torch.matmul(input, weight)


def _linear(
    function: str, equation: str, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The product with a weight (out, in) as it was written."""
    if function == "linear":
        return F.linear(input, weight, bias)
    turned = weight if function == "einsum" else weight.t()
    return _multiply(function, equation, input, turned, bias)


def _at_once(kind: Kind, wide: Wide, input: Tensor, compute: Compute) -> Tensor:
    """(..., in) -> (n, ..., out), with the blocks as a stack."""
    settings: dict[str, Any] = wide.settings
    function, equation = settings["function"], settings["equation"]
    blocks = wide.weight.view(len(wide.widths), *wide.shapes[0])
    stack = blocks.transpose(1, 2) if compute is _linear else blocks
    bias = kind.biases(wide)
    biases = None if bias is None else bias.view(len(blocks), -1)
    if _goes_as_stack(function, equation, input, stack):
        return _batched(input, stack, biases)
    rows = [None] * len(blocks) if biases is None else biases
    each = zip(blocks, rows, strict=True)
    return torch.stack([compute(function, equation, input, *own) for own in each])


def _goes_as_stack(function: str, equation: str, input: Tensor, stack: Tensor) -> bool:
    """Whether a batched product gives what each of the products would; where not, each may raise.

    Under autocast `tensordot` keeps to its own precision.
    """
    dim = {"mm": 2, "addmm": 2, "einsum": len(equation.partition(",")[0])}.get(function)
    if function == "einsum" and equation.startswith("..."):
        dim = None
    autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
    return (
        input.layout is torch.strided
        and input.dim() > 0
        and dim in (None, input.dim())
        and input.shape[-1] == stack.shape[1] > 0
        and (function != "tensordot" if autocast else input.dtype == stack.dtype)
    )


def _batched(input: Tensor, stack: Tensor, biases: Tensor | None) -> Tensor:
    """(..., in), (n, in, out) and (n, out) -> (n, ..., out)."""
    count, inner, width = stack.shape
    rows = input.reshape(-1, inner)
    rows = rows.expand(count, *rows.shape)
    if biases is None:
        product = torch.bmm(rows, stack)
    else:
        product = torch.baddbmm(biases.unsqueeze(1), rows, stack)
    return product.view(count, *input.shape[:-1], width)
