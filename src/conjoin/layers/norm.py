"""The kinds of normalization, which follow wide layers.

The i-th branch's tensor x_i: (batch, c_i, *space), its weight and bias (c_i). Side by side they
are x: (batch, sum c_i, *space), and the blocks one after another are weight and bias (sum c_i), so
that norm(x) holds the norm_i(x_i) side by side:

    BatchNorm      statistics of one channel          the running ones are blocks as well
    InstanceNorm   statistics of one channel          likewise, where there are any
    GroupNorm      of c_i / groups_i channels         merged where that number is equal
    LayerNorm      of the last dimension, c           x: (..., n * c) in n groups of channels
    RMSNorm        likewise                           x: (..., n, c), then times weight (n, c)

No two of them read the same tensor, so nothing looks for siblings among them: they follow wide
layers (see `conjoin.passes.sink`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.checks import Verdict
from conjoin.layers.kind import Kind
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class Norm(Kind):
    """A kind whose wide layer reads the branches' tensors side by side."""

    channels: ClassVar[int | None] = None
    """The dimension of the channels, counted from the end; None where it is dimension 1."""

    least: ClassVar[int] = 2
    """How many branches there must be, so that merging saves more than it adds."""

    gathered = 0
    siblings = False

    def spreads(self, layer: nn.Module) -> bool:
        """Whether a layer goes with any number of channels."""
        return False

    def fits(self, wide: Wide, input: Tensor, dim: int) -> bool:
        """Whether `run` gives what the branches give that lie along `dim`."""
        # Dynamo guards the mode where it is read, so a kind reads it only where it counts.
        if input.dim() + dim != 1:
            return False
        return not self.refuses_one(wide) or input.numel() != input.shape[dim]

    def refuses_one(self, wide: Wide) -> bool:
        """Whether one value a channel is an error, which is the first branch's to raise."""
        return False

    def _check_shapes(self, layer: nn.Module) -> Verdict | None:
        shape = tuple(layer._parameters["weight"].shape)  # type: ignore[union-attr]
        return None if len(shape) == 1 else (Reason.UNSUPPORTED_OPTION, f"weight is {shape}")

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, sum c_i, *space) -> the same."""
        held = {"weight": wide.weight, "bias": wide.bias}
        running = wide.borrowed()
        output = self.normalize(wide, input, {**held, **running}, sum(wide.widths))
        wide.hand_back(running)
        return output

    def along(
        self, wide: Wide, input: Tensor, dim: int, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """Like `run`, for branches that lie along `dim`, counted from the end.

        Where the channels of these layers are another dimension than `dim`, each branch is
        normalized by itself. So is each where somebody has given one buffers, a mode or settings
        of its own.
        """
        apart = wide.out_of_step()
        if not apart and self.fits(wide, input, dim):
            return self.run(wide, input)
        each = [
            apart[i](part)
            if i in apart
            else self.normalize(wide, part, wide.held_by(i), wide.widths[i])
            for i, part in enumerate(self.parts(wide, input, dim, sizes))
        ]
        return torch.cat(each, dim)

    def parts(
        self, wide: Wide, input: Tensor, dim: int, sizes: Sequence[int] | None
    ) -> Sequence[Tensor]:
        """The branches' tensors; of the sizes, of their widths, or of one size."""
        total, widths = input.shape[dim], wide.widths
        found = sizes or (widths if sum(widths) == total else [total // len(widths)] * len(widths))
        return torch.split(input, list(found), dim)

    @abstractmethod
    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """(batch, channels, *space) -> the same, with the tensors that are `held`."""


class _BatchNorm(Norm):
    settings = ("eps", "momentum", "affine", "track_running_stats")
    running = ("running_mean", "running_var", "num_batches_tracked")
    counters = frozenset({"num_batches_tracked"})
    followed = frozenset({"eps", "momentum"})

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses layers without running statistics or with their cumulative average."""
        if not (layer.affine and layer.track_running_stats):
            return Reason.UNSUPPORTED_OPTION, "it has no weight or no running statistics"
        if layer.momentum is None or any(layer._buffers.get(name) is None for name in self.running):
            return Reason.UNSUPPORTED_OPTION, "momentum=None"
        return super().check(layer)

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the types of the running statistics."""
        return {**super().key(layer), "running": _types(self, layer)}

    def refuses_one(self, wide: Wide) -> bool:
        """It is in training."""
        return wide.training

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """As `nn.BatchNorm1d.forward` does."""
        settings: dict[str, Any] = wide.settings
        check: Any = self.layer
        check._check_input_dim(wide, input)
        if wide.training:
            held["num_batches_tracked"].add_(1)
        return F.batch_norm(
            input,
            held["running_mean"],
            held["running_var"],
            held["weight"],
            held["bias"],
            wide.training,
            settings["momentum"],
            settings["eps"],
        )


class BatchNorm1d(_BatchNorm):
    """`nn.BatchNorm1d`."""

    layer = nn.BatchNorm1d


class BatchNorm2d(_BatchNorm):
    """`nn.BatchNorm2d`."""

    layer = nn.BatchNorm2d


class BatchNorm3d(_BatchNorm):
    """`nn.BatchNorm3d`."""

    layer = nn.BatchNorm3d


class GroupNorm(Norm):
    """`nn.GroupNorm`."""

    layer = nn.GroupNorm
    settings = ("eps", "affine")

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the number of channels that are normalized together."""
        return {**super().key(layer), "channels_per_group": layer.num_channels // layer.num_groups}  # type: ignore[operator]

    def refuses_one(self, wide: Wide) -> bool:
        """It is where a channel is a group, in both modes."""
        return wide.settings["channels_per_group"] == 1

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """No group straddles branches, since each has a whole number of groups."""
        settings: dict[str, Any] = wide.settings
        groups = channels // settings["channels_per_group"]
        return F.group_norm(input, groups, held["weight"], held["bias"], settings["eps"])


class _InstanceNorm(Norm):
    settings = ("eps", "momentum", "affine", "track_running_stats")
    running = ("running_mean", "running_var", "num_batches_tracked")
    counters = frozenset({"num_batches_tracked"})
    followed = frozenset({"eps", "momentum"})

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses layers that have only some of their running statistics."""
        tracked = [layer._buffers.get(name) is not None for name in self.running]
        if {*tracked} != {layer.track_running_stats}:
            return Reason.UNSUPPORTED_OPTION, "its running statistics were replaced"
        return super().check(layer)

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the types of the running statistics."""
        return {**super().key(layer), "running": _types(self, layer)}

    def fits(self, wide: Wide, input: Tensor, dim: int) -> bool:
        """Whether the images have a batch or none, lie along the channels, and have a space."""
        # One value a channel may be an error, which is the first branch's to raise.
        spaced = input.shape[dim + 1 :].numel() != 1
        return dim == self.channels and input.dim() in (-dim, 1 - dim) and spaced

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """As `nn.InstanceNorm1d.forward` does."""
        settings: dict[str, Any] = wide.settings
        check: Any = self.layer
        check._check_input_dim(wide, input)
        assert self.channels is not None  # each of these kinds says which
        single = input.dim() == -self.channels
        momentum = settings["momentum"]
        output = F.instance_norm(
            input.unsqueeze(0) if single else input,
            held.get("running_mean"),
            held.get("running_var"),
            held["weight"],
            held["bias"],
            wide.training or not settings["track_running_stats"],
            0.0 if momentum is None else momentum,
            settings["eps"],
        )
        return output.squeeze(0) if single else output


class InstanceNorm1d(_InstanceNorm):
    """`nn.InstanceNorm1d`."""

    layer = nn.InstanceNorm1d
    channels = -2


class InstanceNorm2d(_InstanceNorm):
    """`nn.InstanceNorm2d`."""

    layer = nn.InstanceNorm2d
    channels = -3


class InstanceNorm3d(_InstanceNorm):
    """`nn.InstanceNorm3d`."""

    layer = nn.InstanceNorm3d
    channels = -4


class _LastDimension(Norm):
    """What normalizes the last dimension, of one size in all branches."""

    settings = ("normalized_shape", "eps", "elementwise_affine")
    channels = -1

    def fits(self, wide: Wide, input: Tensor, dim: int) -> bool:
        """Whether the last dimensions have that size, and the dtypes mean the same to `run`."""
        sized = dim == -1 and input.shape[-1] == sum(wide.widths)
        return sized and self.typed(wide, input)

    def typed(self, wide: Wide, input: Tensor) -> bool:
        """Whether `run` gives the dtype that the layers give."""
        held = (wide.weight, wide.bias)
        return all(tensor is None or tensor.dtype == input.dtype for tensor in held)


class LayerNorm(_LastDimension):
    """`nn.LayerNorm`."""

    layer = nn.LayerNorm
    gathered = 3

    def typed(self, wide: Wide, input: Tensor) -> bool:
        """Also under autocast, which treats both functions alike."""
        device = input.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        cast = autocast and input.dtype == torch.get_autocast_dtype(device)
        return cast or super().typed(wide, input)

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., n * c) -> the same: each branch is a group of channels without space."""
        count, eps = len(wide.widths), cast(float, wide.settings["eps"])
        rows = input.reshape(-1, input.shape[-1])
        return torch.group_norm(rows, count, wide.weight, wide.bias, eps).view(input.shape)

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """As `nn.LayerNorm.forward` does."""
        settings: dict[str, Any] = wide.settings
        shape, eps = settings["normalized_shape"], settings["eps"]
        return F.layer_norm(input, shape, held["weight"], held["bias"], eps)


class RMSNorm(_LastDimension):
    """`nn.RMSNorm`."""

    layer = nn.RMSNorm
    # The weight is multiplied by itself then, which is one launch more, and in backward too.
    least = 3

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(..., n * c) -> the same."""
        settings: dict[str, Any] = wide.settings
        shape = len(wide.widths), wide.widths[0]
        parts: Tensor = torch.unflatten(input, -1, shape)
        normed = F.rms_norm(parts, shape[1:], None, settings["eps"])
        return (normed * wide.weight.view(shape)).flatten(-2)

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """As `nn.RMSNorm.forward` does."""
        settings: dict[str, Any] = wide.settings
        return F.rms_norm(input, settings["normalized_shape"], held["weight"], settings["eps"])


def _types(kind: Kind, layer: nn.Module) -> tuple[object, ...]:
    """The types of a layer's running statistics."""
    running = [layer._buffers.get(name) for name in kind.running]
    return tuple((t.dtype, t.device) for t in running if t is not None)


NORMALIZATIONS: tuple[Kind, ...] = (
    BatchNorm1d(),
    BatchNorm2d(),
    BatchNorm3d(),
    InstanceNorm1d(),
    InstanceNorm2d(),
    InstanceNorm3d(),
    GroupNorm(),
    LayerNorm(),
    RMSNorm(),
)
"""The normalizations that follow wide layers."""
