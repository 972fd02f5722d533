"""The kinds of convolution with a module's own Parameters, such as `F.conv2d(x, self.w)`.

They equal layers, so that what `conv.py` says of `nn.Conv2d` and the others goes for them: the
blocks (out_i, in, *kernel) are the weight of one wide convolution, and those of transposed ones are
joined at each call. A `Convolution` is such Parameters as a layer, see `owner.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers import conv
from conjoin.layers.kind import Kind
from conjoin.layers.product import Product


class Convolution(Product):
    """A convolution by a function, with the attributes of the layer that it equals."""

    convolve: ClassVar[Callable[..., Tensor]]
    dims: ClassVar[int]
    in_dim: ClassVar[int] = 1
    defaults: ClassVar[Mapping[str, Any]] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    padding_mode = "zeros"
    _reversed_padding_repeated_twice: ClassVar[tuple[int, ...]] = ()

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, given: Mapping[str, Any]
    ) -> None:
        """Takes the Parameters as they are.

        Args:
            weight: (out, in, *kernel), or (in, out, *kernel) where it is transposed.
            bias: (out), or None.
            given: the settings by name.
        """
        super().__init__(type(self).convolve.__name__, weight, bias)
        self.given = dict(given)
        self.in_channels = weight.shape[self.in_dim]
        self.kernel_size = tuple(weight.shape[2:])
        for name, value in given.items():
            setattr(self, name, value)

    def written(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(batch, in, *space), the weight and (out) -> (batch, out, *space')."""
        return type(self).convolve(input, weight, bias, **self.given)


class _Transposed(Convolution):
    in_dim = 0
    defaults: ClassVar[Mapping[str, Any]] = {
        "stride": 1,
        "padding": 0,
        "output_padding": 0,
        "groups": 1,
        "dilation": 1,
    }


class Conv1d(Convolution):
    """`F.conv1d`."""

    convolve = staticmethod(F.conv1d)
    dims = 3


class Conv2d(Convolution):
    """`F.conv2d`."""

    convolve = staticmethod(F.conv2d)
    dims = 4


class Conv3d(Convolution):
    """`F.conv3d`."""

    convolve = staticmethod(F.conv3d)
    dims = 5


class ConvTranspose1d(_Transposed):
    """`F.conv_transpose1d`."""

    convolve = staticmethod(F.conv_transpose1d)
    dims = 3


class ConvTranspose2d(_Transposed):
    """`F.conv_transpose2d`."""

    convolve = staticmethod(F.conv_transpose2d)
    dims = 4


class ConvTranspose3d(_Transposed):
    """`F.conv_transpose3d`."""

    convolve = staticmethod(F.conv_transpose3d)
    dims = 5


class _OfFunction(Kind):
    @property
    def name(self) -> str:
        """The name that reports show."""
        return cast("type[Convolution]", self.layer).convolve.__name__


class _OfConv1d(_OfFunction, conv.Conv1d):
    layer = Conv1d  # type: ignore[assignment]


class _OfConv2d(_OfFunction, conv.Conv2d):
    layer = Conv2d  # type: ignore[assignment]


class _OfConv3d(_OfFunction, conv.Conv3d):
    layer = Conv3d  # type: ignore[assignment]


class _OfConvTranspose1d(_OfFunction, conv.ConvTranspose1d):
    layer = ConvTranspose1d  # type: ignore[assignment]


class _OfConvTranspose2d(_OfFunction, conv.ConvTranspose2d):
    layer = ConvTranspose2d  # type: ignore[assignment]


class _OfConvTranspose3d(_OfFunction, conv.ConvTranspose3d):
    layer = ConvTranspose3d  # type: ignore[assignment]


KINDS: tuple[Kind, ...] = (
    *(_OfConv1d(), _OfConv2d(), _OfConv3d()),
    *(_OfConvTranspose1d(), _OfConvTranspose2d(), _OfConvTranspose3d()),
)
"""The kinds of convolution by a function."""

CONVOLUTIONS: Mapping[str, type[Convolution]] = {
    product.convolve.__name__: product
    for product in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}
"""The products by the names of their functions."""
