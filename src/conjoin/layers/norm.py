"""Normalizations, which act on each channel, or on each group of channels, by themselves.

The i-th branch's tensor x_i: (batch, c_i, *space), its weight and bias (c_i). Side by side they
are x: (batch, sum c_i, *space), and the blocks one after another are weight and bias (sum c_i), so
that norm(x) holds the norm_i(x_i) side by side:

    BatchNorm      statistics of one channel          the running ones are blocks as well
    InstanceNorm   statistics of one channel
    GroupNorm      of c_i / groups_i channels         merged where that number is equal
    LayerNorm      of the last dimension              x: (..., n, c), equal c

No two of them read the same tensor, so nothing looks for siblings among them: they follow wide
layers (see `conjoin.passes.sink`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjoin.layers.kind import Kind, Verdict
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


class Norm(Kind):
    """A kind whose wide layer reads the branches' tensors side by side."""

    def _shaped(self, layer: nn.Module) -> Verdict | None:
        shape = tuple(layer._parameters["weight"].shape)  # type: ignore[union-attr]
        return None if len(shape) == 1 else (Reason.UNSUPPORTED_OPTION, f"weight is {shape}")

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(batch, sum c_i, *space) -> the same."""
        held = {"weight": wide.weight, "bias": wide.bias}
        return self.normalize(wide, input, {**held, **wide.running}, sum(wide.widths))

    def along(self, wide: Wide, input: Tensor, dim: int) -> Tensor:
        """Like `run`, for branches that lie along `dim`, counted from the end.

        The channels of these layers are dimension 1 of what each is called with. Where that is
        another dimension than `dim`, each branch is normalized by itself. So is each where
        somebody has given one buffers of its own, or another mode.
        """
        apart = wide.out_of_step()
        # One value a channel is an error in training, which is the first branch's to raise.
        single = wide.training and input.numel() == input.shape[dim]
        if input.dim() + dim == 1 and not apart and not single:
            return self.run(wide, input)
        total, widths = input.shape[dim], wide.widths
        sizes = widths if sum(widths) == total else [total // len(widths)] * len(widths)
        each = [
            apart[i](part) if i in apart else self.normalize(wide, part, wide.held_by(i), widths[i])
            for i, part in enumerate(torch.split(input, sizes, dim))
        ]
        return torch.cat(each, dim)

    @abstractmethod
    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """(batch, channels, *space) -> the same, with the tensors that are `held`."""


class _BatchNorm(Norm):
    settings = ("eps", "momentum", "affine", "track_running_stats")
    running = ("running_mean", "running_var", "num_batches_tracked")
    counters = frozenset({"num_batches_tracked"})

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses layers without running statistics or with their cumulative average."""
        if not (layer.affine and layer.track_running_stats):
            return Reason.UNSUPPORTED_OPTION, "it has no weight or no running statistics"
        if layer.momentum is None or any(layer._buffers.get(name) is None for name in self.running):
            return Reason.UNSUPPORTED_OPTION, "momentum=None"
        return super().check(layer)

    def key(self, layer: nn.Module) -> dict[str, object]:
        """Also the types of the running statistics."""
        running = [layer._buffers[name] for name in self.running]
        return {
            **super().key(layer),
            "running": tuple((t.dtype, t.device) for t in running if t is not None),
        }

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

    def normalize(self, wide: Wide, input: Tensor, held: dict[str, Any], channels: int) -> Tensor:
        """No group straddles branches, since each has a whole number of groups."""
        settings: dict[str, Any] = wide.settings
        groups = channels // settings["channels_per_group"]
        return F.group_norm(input, groups, held["weight"], held["bias"], settings["eps"])


NORMS: tuple[Kind, ...] = (BatchNorm1d(), BatchNorm2d(), BatchNorm3d(), GroupNorm())
"""The kinds that follow wide layers."""
