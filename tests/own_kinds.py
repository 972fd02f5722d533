"""Layers of somebody's own, and the kinds that let conjoin merge siblings of them."""

import torch
from torch import nn
from torch.nn import functional as F

import conjoin


class Equalized(nn.Linear):
    """A subclass with a forward of its own: an equalized learning rate."""

    def __init__(self, in_features, out_features, bias=True, gain=1.0):
        super().__init__(in_features, out_features, bias)
        self.scale = gain * in_features**-0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class OfEqualized(conjoin.Kind):
    layer = Equalized
    settings = ("in_features", "scale")

    def run(self, wide, input):
        return F.linear(input, wide.weight * wide.settings["scale"], self.biases(wide))


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is (in, out), and which is no nn.Linear."""

    def __init__(self, width, channels):
        super().__init__()
        self.nx, self.nf = channels, width
        self.weight = nn.Parameter(torch.randn(channels, width))
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class OfConv1D(conjoin.Kind):
    layer = Conv1D
    settings = ("nx",)
    weight_dim = 1

    def run(self, wide, input):
        return F.linear(input, self.joined(wide).t(), self.biases(wide))


OWN_KINDS = (*conjoin.KINDS, OfEqualized(), OfConv1D())


class OwnHeads(nn.Module):
    """Layers of classes of one's own, whose kinds are passed, beside plain ones"""

    def __init__(self):
        super().__init__()
        self.a, self.b = Equalized(6, 3), Equalized(6, 5)
        self.c, self.d = Conv1D(2, 6), Conv1D(4, 6)
        self.e, self.f = nn.Linear(6, 3), nn.Linear(6, 5)
        self.double()

    def forward(self, x):
        return self.a(x), self.b(x), self.c(x), self.d(x), self.e(x), self.f(x)
