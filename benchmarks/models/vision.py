"""The encoder of a VAE, Inception, and the heads of a detector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models.by_hand import joined


class VAE(nn.Module):
    """Two heads, of convolutions, on one encoder; without noise, so that runs can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(3),
            nn.Conv2d(16, 64, 3), nn.ReLU(), nn.MaxPool2d(3),
        )  # fmt: skip
        self.mean, self.log_var = nn.Conv2d(64, 64, 2), nn.Conv2d(64, 64, 2)
        self.decoder = nn.Linear(64, 784)

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(h).flatten(1), self.log_var(h).flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mean, log_var = self.heads(self.encoder(x))
        return self.decoder(mean + torch.exp(log_var / 2)), mean, log_var


class WideVAE(VAE):
    def __init__(self, plain: VAE) -> None:
        nn.Module.__init__(self)
        self.encoder, self.decoder = plain.encoder, plain.decoder
        self.both = joined([plain.mean, plain.log_var], nn.Conv2d(64, 128, 2))

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.both(h).flatten(1).chunk(2, 1)


class ConvNorm(nn.Sequential):
    """A convolution, its BatchNorm and a ReLU."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )


class Inception(nn.Module):
    """Four branches, joined; three of them begin with a 1x1 convolution of the input."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pool = widths
        self.one = ConvNorm(channels, one, 1)
        self.three = nn.Sequential(ConvNorm(channels, three_in, 1), ConvNorm(three_in, three, 3))
        self.five = nn.Sequential(ConvNorm(channels, five_in, 1), ConvNorm(five_in, five, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class WideInception(nn.Module):
    def __init__(self, plain: Inception) -> None:
        super().__init__()
        first = [plain.one, plain.three[0], plain.five[0]]
        self.widths = [each[0].out_channels for each in first]
        self.first = joined(first, ConvNorm(plain.one[0].in_channels, sum(self.widths), 1))
        self.three, self.five, self.pool = plain.three[1], plain.five[1], plain.pool

    def forward(self, x: Tensor) -> Tensor:
        one, three, five = self.first(x).split(self.widths, 1)
        return torch.cat([one, self.three(three), self.five(five), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """A stem, three Inception blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), ConvNorm(64, 192, 3)
        )
        self.blocks = nn.Sequential(
            Inception(192, (64, 96, 128, 16, 32, 32)),
            Inception(256, (128, 128, 192, 32, 96, 64)),
            nn.MaxPool2d(3, 2, 1),
            Inception(480, (192, 96, 208, 16, 48, 64)),
        )
        self.classifier = nn.Linear(512, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class WideGoogLeNet(GoogLeNet):
    def __init__(self, plain: GoogLeNet) -> None:
        nn.Module.__init__(self)
        self.stem, self.classifier = plain.stem, plain.classifier
        self.blocks = nn.Sequential(
            *(WideInception(m) if isinstance(m, Inception) else m for m in plain.blocks)
        )


class Detector(nn.Module):
    """Two towers, for classes and for boxes, on each level of a feature pyramid."""

    def __init__(self, width: int = 64, classes: int = 20, anchors: int = 9) -> None:
        super().__init__()
        self.classes = self._tower(width, classes * anchors)
        self.boxes = self._tower(width, 4 * anchors)

    @staticmethod
    def _tower(width: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, out, 3, padding=1),
        )  # fmt: skip

    def forward(self, *levels: Tensor) -> list[Tensor]:
        return [tower(level) for level in levels for tower in (self.classes, self.boxes)]


class WideDetector(nn.Module):
    def __init__(self, plain: Detector) -> None:
        super().__init__()
        both, width = (plain.classes, plain.boxes), plain.classes[0].in_channels
        self.towers = nn.Sequential(
            joined([tower[0] for tower in both], nn.Conv2d(width, 2 * width, 3, padding=1)),
            nn.ReLU(),
            joined(
                [tower[2] for tower in both],
                nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2),
            ),
            nn.ReLU(),
        )
        self.classes, self.boxes = plain.classes[4], plain.boxes[4]

    def forward(self, *levels: Tensor) -> list[Tensor]:
        found = []
        for level in levels:
            classes, boxes = self.towers(level).chunk(2, 1)
            found += [self.classes(classes), self.boxes(boxes)]
        return found
