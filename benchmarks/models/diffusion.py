"""What the blocks of a U-Net make of one time embedding, alone and in a small U-Net."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.by_hand import joined


class TimeProjections(nn.Module):
    """The projections of a diffusion U-Net alone, each behind an activation of its own."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, out)) for _ in range(count)
        )

    def forward(self, t: Tensor) -> list[Tensor]:
        return [projection(t) for projection in self.projections]


class WideTimeProjections(nn.Module):
    def __init__(self, plain: TimeProjections) -> None:
        super().__init__()
        layers = [projection[1] for projection in plain.projections]
        width, self.out = layers[0].in_features, layers[0].out_features
        self.wide = joined(layers, nn.Linear(width, self.out * len(layers)))

    def forward(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.wide(F.silu(t)).split(self.out, -1)


class ResBlock(nn.Module):
    """Two convolutions with their norms, and the time embedding in between."""

    def __init__(self, channels: int, width: int, times: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, width, 3, padding=1)
        )
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(times, width))
        self.second = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x) + self.time(t)[:, :, None, None]
        return self.skip(x) + self.second(h)


class UNet(nn.Module):
    """Three levels, ten blocks: x (batch, 3, height, width) and t (batch, times)."""

    def __init__(self, width: int = 32, times: int = 128) -> None:
        super().__init__()
        wide = 2 * width
        self.begin = nn.Conv2d(3, width, 3, padding=1)
        down = [(width, width), (width, wide), (wide, wide)]
        middle = [(wide, wide)] * 4
        up = [(2 * wide, wide), (2 * wide, width), (2 * width, width)]
        self.blocks = nn.ModuleList(ResBlock(*pair, times) for pair in down + middle + up)
        self.end = nn.Conv2d(width, 3, 3, padding=1)

    def times(self, t: Tensor) -> tuple[Tensor, ...]:
        return (t,) * len(self.blocks)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, skips = self.begin(x), []
        for number, (block, time) in enumerate(zip(self.blocks, self.times(t), strict=True)):
            if number >= 7:
                x = torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1)
            x = block(x, time)
            if number < 3:
                skips.append(x)
                x = F.avg_pool2d(x, 2)
        return self.end(x)


class WideUNet(UNet):
    def __init__(self, plain: UNet) -> None:
        nn.Module.__init__(self)
        self.begin, self.end = plain.begin, plain.end
        layers = [block.time[1] for block in plain.blocks]
        self.widths = [layer.out_features for layer in layers]
        self.time = joined(layers, nn.Linear(layers[0].in_features, sum(self.widths)))
        self.blocks = nn.ModuleList(map(copy.copy, plain.blocks))
        for block in self.blocks:
            block._modules = {**block._modules, "time": nn.Identity()}

    def times(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.time(F.silu(t)).split(self.widths, -1)
