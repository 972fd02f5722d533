"""The kinds `Conv1d` to `Conv3d` and `ConvTranspose1d` to `ConvTranspose3d`.

x: (batch, in, *space), W_i: (out_i, in, *kernel). The blocks W_i stacked along dimension 0 are the
wide layer's weight: (sum out_i, in, *kernel).

A transposed convolution keeps its channels the other way round, W_i: (in, out_i, *kernel). The
wide weight (in, sum out_i, *kernel) would interleave the blocks in memory, so they are kept one
after another and joined at each call.

With groups > 1 one convolution of x would interleave the siblings' channels within each group, and
copying them apart costs more than it saves, since no fast path knows two channels a group. So the
input is repeated, x (batch, n * in, *space), and siblings of one shape run on it like layers on
different inputs, see below: 2 launches, and the parts lie side by side. What is written and kept is
n times the input, so it depends on each input whether that pays, see `REPEATED`. Where it does not,
the siblings run one by one, and a rewritten forward joins what they give, so that what is behind
them still runs at once. So it calls the wide layer only if it paid in the example, and otherwise
the views, which need no joint. `grouped_small` and `grouped_large` in the benchmark are such
models.

Kernels of different size could be padded with zeros to the largest. That is exact where the padding
is made at each call, so that no zero trains: three launches, to pad, to join and to convolve, in
the place of two, as two wide layers are, and more arithmetic. A padded weight that is kept, whose
zeros and their gradients would have to be hidden, saves a little for small images only. So they are
refused as well.

On different inputs x_i, with n equal shapes, the same blocks are the weight of a grouped
convolution, of x (batch, n * in, *space) in n groups: (batch, n * out, *space').
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.checks import Verdict
from conjoin.layers.kind import Kind, elements, memory_format
from conjoin.layers.lockstep import runs_python
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


REPEATED = 2**17
"""How many elements an input may have, repeated for each of the siblings with groups > 1.

Up to there one call takes less time than one for each, forward and in training, most of all where
they are depthwise. Far above memory is mapped anew for each call (`grouped_small` and
`grouped_large` in the benchmark are on either side).
"""


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
        """The settings, with a number for each dimension of space; also the width of groups."""
        found = super().key(layer)
        if _grouped(found["groups"]):
            found["out_channels"] = layer.out_channels
        for name in ("stride", "dilation", "output_padding"):
            if name in found:
                found[name] = _for_each(found[name], -1 - self.output_dim)
        return found

    def pays(self, wide: Wide, input: Tensor | None = None) -> bool:
        """With groups > 1 only for small inputs: they are repeated, which ends channels_last."""
        if not _grouped(wide.settings["groups"]):
            return True
        if input is None or input.dim() < -self.output_dim or wide.channels_last:
            return False
        small = elements(input) * len(wide.widths) <= REPEATED
        return small and memory_format(input) != "channels_last"


def _grouped(groups: object) -> bool:
    return isinstance(groups, int) and groups > 1


def repeated(input: Tensor, dim: int, number: int) -> Tensor:
    """The input so often, side by side along a dimension, which is counted from the end."""
    dim += input.dim()
    sizes = [-1] * (input.dim() + 1)
    sizes[dim] = number
    return input.unsqueeze(dim).expand(sizes).flatten(dim, dim + 1)


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
        number = len(wide.widths)
        if number == 1 or not _grouped(wide.settings["groups"]):
            return self._convolve(wide, input, wide.weight, self.biases(wide), 1)
        # A graph is compiled for many sizes, and is not to be guarded by one of them.
        if runs_python() and self.pays(wide, input):
            return self.apart(wide, repeated(input, self.output_dim, number))
        return torch.cat([*self._one_by_one(wide, input)], self.output_dim)

    def _one_by_one(self, wide: Wide, input: Tensor) -> Iterator[Tensor]:
        """(batch, in, *space) -> (batch, out, *space') for each sibling."""
        bias = self.biases(wide)
        biases = (None,) * len(wide.widths) if bias is None else torch.split(bias, wide.widths)
        for weight, own in zip(torch.split(wide.weight, wide.widths), biases, strict=True):
            yield self._convolve(wide, input, weight, own, 1)

    def direct(self, wide: Wide, *, apart: bool = False) -> Callable[[Tensor], Tensor] | None:
        """Both, where there are no groups, nothing is padded and no zeros fill gaps."""
        settings: dict[str, Any] = wide.settings
        plain = settings["padding_mode"] == "zeros" and not _grouped(settings["groups"])
        if not plain or len({*wide.biased}) > 1:
            return None
        held: dict[str, Any] = wide._parameters
        function, groups = type(self).function, len(wide.widths) if apart else 1
        rest = *(settings[name] for name in ("stride", "padding", "dilation")), groups
        return lambda input: function(input, held["weight"], held["bias"], *rest)

    def convolves(self, layer: nn.Module) -> bool:
        """Where there are no groups."""
        return not _grouped(layer.groups)

    def check_together(
        self, layers: Sequence[nn.Module], copies: int, shape: Sequence[int] | None
    ) -> Verdict | None:
        """Refuses grouped convolutions where repeating the input is more than what it saves."""
        groups, number = layers[0].groups, len(layers)
        if not _grouped(groups):
            return None
        if copies and copies + 2 > number:
            return Reason.GROUPED, f"groups={groups}, with {copies} outputs to copy"
        if shape is not None and math.prod(shape) * number > REPEATED:
            return (
                Reason.GROUPED,
                f"groups={groups}, and {number} copies of the input are too large",
            )
        return None

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, n * in, *space) -> (batch, n * out, *space')."""
        return self._convolve(wide, input, wide.weight, self.biases(wide), len(wide.widths))

    def _convolve(
        self, wide: Wide, input: Tensor, weight: Tensor, bias: Tensor | None, branches: int
    ) -> Tensor:
        settings: dict[str, Any] = wide.settings
        padding = settings["padding"]
        if settings["padding_mode"] != "zeros":
            input = F.pad(input, settings["_reversed_padding"], mode=settings["padding_mode"])
            padding = 0
        return type(self).function(
            input,
            weight,
            bias,
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

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses groups, of whose channels the weight holds those of one only."""
        if _grouped(layer.groups):
            return Reason.GROUPED, f"transposed, groups={layer.groups}"
        return super().check(layer)

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
