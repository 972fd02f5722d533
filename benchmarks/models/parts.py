"""One rewrite at a time: models on which one pass makes the difference.

Heads alone are what `Widen` merges. The others have the same heads and one thing more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.by_hand import Stacked, apart, joined
from benchmarks.models.vision import ConvNorm


class Heads(nn.Module):
    """`Widen`: x (batch, width) -> what each head makes of it."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, out) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads]


class WideHeads(nn.Module):
    def __init__(self, plain: Heads) -> None:
        super().__init__()
        width, self.out = plain.heads[0].in_features, plain.heads[0].out_features
        self.heads = joined(plain.heads, nn.Linear(width, self.out * len(plain.heads)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.heads(x).split(self.out, -1)


class Norms(nn.Module):
    """`Sink`: x (batch, channels, height, width); to each head its BatchNorm, ReLU and pooling.

    What the model gives is a sigmoid of the pooled: the split stays above the last operation.
    """

    def __init__(self, count: int, channels: int, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ConvNorm(channels, width, 1) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.adaptive_avg_pool2d(head(x), 1).sigmoid() for head in self.heads]


class WideNorms(nn.Module):
    def __init__(self, plain: Norms) -> None:
        super().__init__()
        first = plain.heads[0][0]
        self.width, count = first.out_channels, len(plain.heads)
        self.wide = joined(plain.heads, ConvNorm(first.in_channels, self.width * count, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.adaptive_avg_pool2d(self.wide(x), 1).sigmoid().split(self.width, 1)


class GroupedNorm(nn.Sequential):
    """A convolution with groups, its BatchNorm and a ReLU."""

    def __init__(self, channels: int, groups: int) -> None:
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU())


class Grouped(nn.Module):
    """`Sink` and `Towers` behind groups: x (batch, channels, height, width), two layers deep."""

    def __init__(self, count: int, channels: int, groups: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(GroupedNorm(channels, groups), GroupedNorm(channels, groups))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


class WideGrouped(nn.Module):
    """The input repeated, and convolutions of as many groups as all branches have."""

    def __init__(self, plain: Grouped) -> None:
        super().__init__()
        self.count = len(plain.branches)
        conv = plain.branches[0][0][0]
        channels, groups = conv.out_channels * self.count, conv.groups * self.count
        first, second = zip(*plain.branches, strict=True)
        self.wide = nn.Sequential(
            *(joined(each, GroupedNorm(channels, groups)) for each in (first, second))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.wide(x.repeat(1, self.count, 1, 1)).chunk(self.count, 1)


class Towers(nn.Module):
    """`Towers`: x (batch, width); a second layer behind each head."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Linear(out, out))
            for _ in range(count)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [tower(x) for tower in self.towers]


class WideTowers(nn.Module):
    def __init__(self, plain: Towers) -> None:
        super().__init__()
        first, _, second = zip(*plain.towers, strict=True)
        self.count, (out, width) = len(first), first[0].weight.shape
        self.first, self.second = joined(first, nn.Linear(width, out * self.count)), Stacked(second)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.second(apart(torch.relu(self.first(x)), self.count)).unbind()


class Shared(nn.Module):
    """`Batch`: four tensors (batch, width), and one encoder that is called with each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh()
        )

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
        return [self.encoder(x) for x in (a, b, c, d)]


class WideShared(nn.Module):
    def __init__(self, plain: Shared) -> None:
        super().__init__()
        self.encoder = plain.encoder

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.encoder(torch.stack(inputs)).unbind()


class Joined(Heads):
    """`Cancel`: x (batch, width); what the heads give is joined again."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(super().forward(x), -1)


class WideJoined(nn.Module):
    def __init__(self, plain: Joined) -> None:
        super().__init__()
        out, width = plain.heads[0].weight.shape
        self.wide = joined(plain.heads, nn.Linear(width, out * len(plain.heads)))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x)
