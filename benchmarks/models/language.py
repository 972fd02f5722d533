"""Attention, with as many heads for keys and values or with fewer, and the gated feed-forward."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.by_hand import joined


class Attention(nn.Module):
    """x (batch, tokens, width) -> the same; with fewer `groups` than `heads`, grouped-query."""

    def __init__(self, width: int = 512, heads: int = 8, groups: int = 8) -> None:
        super().__init__()
        self.size = width // heads
        narrow = groups * self.size
        self.q, self.k, self.v = (nn.Linear(width, out) for out in (width, narrow, narrow))
        self.out = nn.Linear(width, width)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.size)).transpose(1, 2) for y in self.projections(x))
        grouped = k.shape[1] != q.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.out(y.transpose(1, 2).flatten(-2))


class WideAttention(Attention):
    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)
        self.size, self.out = plain.size, plain.out
        layers = [plain.q, plain.k, plain.v]
        self.widths = [layer.out_features for layer in layers]
        self.qkv = joined(layers, nn.Linear(plain.q.in_features, sum(self.widths)))

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).split(self.widths, -1)


class Gated(nn.Module):
    """The feed-forward of Llama and its like."""

    def __init__(self, width: int = 512, hidden: int = 1376) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class WideGated(nn.Module):
    def __init__(self, plain: Gated) -> None:
        super().__init__()
        width, hidden = plain.gate.in_features, plain.gate.out_features
        self.both = joined([plain.gate, plain.up], nn.Linear(width, 2 * hidden, bias=False))
        self.down = plain.down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
