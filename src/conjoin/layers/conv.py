"""Convolutions.

x: (batch, in, *space), W_i: (out_i, in, *kernel). The blocks W_i stacked along dimension 0 are the
wide layer's weight: (sum out_i, in, *kernel).

A transposed convolution keeps its channels the other way round, W_i: (in, out_i, *kernel). The
wide weight (in, sum out_i, *kernel) would interleave the blocks in memory, so they are kept one
after another and joined at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.kind import Kind, Verdict
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class _Convolution(Kind):
    """What all convolutions have in common."""

    function: ClassVar[Callable[..., Tensor]]
    bias_on_some = True

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses grouped convolutions, whose channels would have to be interleaved."""
        if isinstance(layer.groups, int) and layer.groups > 1:
            return Reason.GROUPED, f"groups={layer.groups}"
        return super().check(layer)


class _Conv(_Convolution):
    settings = (
        "in_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def key(self, layer: nn.Module) -> dict[str, object]:
        """The settings, with the padding in numbers, and as `F.pad` wants it."""
        around: Any = layer._reversed_padding_repeated_twice
        found = {**super().key(layer), "_reversed_padding": tuple(around)}
        if isinstance(layer.padding, str) and tuple(around[::2]) == tuple(around[1::2]):
            found["padding"] = tuple(reversed(around[::2]))
        return found

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, in, *space) -> (batch, sum out_i, *space')."""
        settings: dict[str, Any] = wide.settings
        padding = settings["padding"]
        if settings["padding_mode"] != "zeros":
            input = F.pad(input, settings["_reversed_padding"], mode=settings["padding_mode"])
            padding = 0
        return type(self).function(
            input,
            wide.weight,
            self.biases(wide),
            settings["stride"],
            padding,
            settings["dilation"],
            settings["groups"],
        )


class _ConvTranspose(_Convolution):
    settings = (
        "in_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )
    weight_dim = 1

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, in, *space) -> (batch, sum out_i, *space')."""
        settings: dict[str, Any] = wide.settings
        return type(self).function(
            input,
            self.joined(wide),
            self.biases(wide),
            settings["stride"],
            settings["padding"],
            settings["output_padding"],
            settings["groups"],
            settings["dilation"],
        )


class Conv1d(_Conv):
    """`nn.Conv1d`."""

    layer = nn.Conv1d
    function = staticmethod(F.conv1d)
    output_dim = -2


class Conv2d(_Conv):
    """`nn.Conv2d`."""

    layer = nn.Conv2d
    function = staticmethod(F.conv2d)
    output_dim = -3


class Conv3d(_Conv):
    """`nn.Conv3d`."""

    layer = nn.Conv3d
    function = staticmethod(F.conv3d)
    output_dim = -4


class ConvTranspose1d(_ConvTranspose):
    """`nn.ConvTranspose1d`."""

    layer = nn.ConvTranspose1d
    function = staticmethod(F.conv_transpose1d)
    output_dim = -2


class ConvTranspose2d(_ConvTranspose):
    """`nn.ConvTranspose2d`."""

    layer = nn.ConvTranspose2d
    function = staticmethod(F.conv_transpose2d)
    output_dim = -3


class ConvTranspose3d(_ConvTranspose):
    """`nn.ConvTranspose3d`."""

    layer = nn.ConvTranspose3d
    function = staticmethod(F.conv_transpose3d)
    output_dim = -4
