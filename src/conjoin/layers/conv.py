"""Convolutions.

x: (batch, in, *space), W_i: (out_i, in, *kernel). The blocks W_i stacked along dimension 0 are the
wide layer's weight: (sum out_i, in, *kernel).

A transposed convolution keeps its channels the other way round, W_i: (in, out_i, *kernel). The
wide weight (in, sum out_i, *kernel) would interleave the blocks in memory, so they are kept one
after another and joined at each call.

With groups > 1 the wide output has, within each group, the channels of one sibling after those of
the other. A part of it is a tensor whose channels lie apart, so that `.view(batch, -1)`, which the
sibling's output and every plain slice allow, raises; and with a copy of each part, n launches
become n + 2. Repeating the input n times instead keeps the parts together in 2 launches, for widths
that are equal, but has n times the input to write, read and keep for backward. So they are refused.
Measured on one core, two depthwise 3x3 convolutions as one, copies included, take 1.0 to 4.4 of
their time forward and 0.9 to 4.9 in training, since no fast path knows two channels a group.

Kernels of different size could be padded with zeros to the largest, which multiplies the
arithmetic: 1x1 beside 3x3 takes 1.0 to 1.9 of the time then, in nearly all widths and sizes that
were measured, forward and in training. So they are refused as well.

On different inputs x_i, with n equal shapes, the same blocks are the weight of a grouped
convolution, of x (batch, n * in, *space) in n groups: (batch, n * out, *space').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.kind import Kind, Verdict
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


def _for_each(setting: Any, dimensions: int) -> Any:
    """One number for each dimension, where there may be one for all; or a word."""
    if isinstance(setting, str):
        return setting
    if isinstance(setting, tuple):
        return setting * dimensions if len(setting) == 1 else setting
    return (setting,) * dimensions


class _Convolution(Kind):
    """What all convolutions have in common."""

    function: ClassVar[Callable[..., Tensor]]
    stacked = False
    bias_on_some = True

    def key(self, layer: nn.Module) -> dict[str, object]:
        """The settings, with a number for each dimension of space."""
        found = super().key(layer)
        for name in ("stride", "dilation", "output_padding"):
            if name in found:
                found[name] = _for_each(found[name], -1 - self.output_dim)
        return found

    def check_together(self, layer: nn.Module) -> Verdict | None:
        """Refuses grouped convolutions, whose channels are interleaved in a wide layer."""
        if isinstance(layer.groups, int) and layer.groups > 1:
            return Reason.GROUPED, f"groups={layer.groups}"
        return None


def _around(settings: dict[str, Any], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The padding before and after each dimension, the last one first, as `F.pad` wants it."""
    padding = settings["padding"]
    if padding == "valid":
        return (0, 0) * len(kernel)
    if padding != "same":
        return tuple(number for number in reversed(padding) for _ in range(2))
    steps = zip(settings["dilation"], kernel, strict=False)
    totals = [step * (size - 1) for step, size in steps]
    return tuple(part for t in reversed(totals) for part in (t // 2, t - t // 2))


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
        """The settings, in one spelling, with the padding also as `F.pad` wants it."""
        found: dict[str, Any] = super().key(layer)
        weight: Any = layer.weight
        kernel = tuple(weight.shape[2:])
        found["padding"] = _for_each(found["padding"], len(kernel))
        if len(found["dilation"]) == len(kernel):
            steps = zip(found["dilation"], kernel, strict=True)
            found["dilation"] = tuple(step if size > 1 else 1 for step, size in steps)
        around: Any = tuple(layer._reversed_padding_repeated_twice)  # type: ignore[arg-type]
        if found["padding_mode"] == "zeros":
            around = _around(found, kernel)
        if around[::2] == around[1::2]:
            found["padding"] = tuple(reversed(around[::2]))
        found["_reversed_padding"] = around
        return found

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, in, *space) -> (batch, sum out_i, *space')."""
        return self._convolve(wide, input, 1)

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, n * in, *space) -> (batch, n * out, *space')."""
        return self._convolve(wide, input, len(wide.widths))

    def _convolve(self, wide: Wide, input: Tensor, branches: int) -> Tensor:
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
            settings["groups"] * branches,
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
        return self._convolve(wide, input, self.joined(wide), 1)

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, n * in, *space) -> (batch, n * out, *space')."""
        blocks = (
            torch.cat(self._blocks(wide, wide.weight))
            if wide.channels_last
            else (wide.weight.view(len(wide.widths) * wide.shapes[0][0], *wide.shapes[0][1:]))
        )
        return self._convolve(wide, input, blocks, len(wide.widths))

    def _convolve(self, wide: Wide, input: Tensor, weight: Tensor, branches: int) -> Tensor:
        settings: dict[str, Any] = wide.settings
        return type(self).function(
            input,
            weight,
            self.biases(wide),
            settings["stride"],
            settings["padding"],
            settings["output_padding"],
            settings["groups"] * branches,
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
