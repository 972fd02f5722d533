"""Models in the idiom of public code that hold raw Parameters, and what becomes of each."""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

import conjoin


def normal(*shape):
    return nn.Parameter(torch.randn(shape) / shape[0] ** 0.5)


class AutoInt(nn.Module):
    """The interacting layer of AutoInt, as recommenders write it."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.size = width // heads
        self.W_Query, self.W_key = normal(width, width), normal(width, width)
        self.W_Value, self.W_Res = normal(width, width), normal(width, width)

    def forward(self, inputs):
        querys = torch.tensordot(inputs, self.W_Query, dims=([-1], [0]))
        keys = torch.tensordot(inputs, self.W_key, dims=([-1], [0]))
        values = torch.tensordot(inputs, self.W_Value, dims=([-1], [0]))
        querys = torch.stack(torch.split(querys, self.size, dim=2))
        keys = torch.stack(torch.split(keys, self.size, dim=2))
        values = torch.stack(torch.split(values, self.size, dim=2))
        scores = torch.einsum("bnik,bnjk->bnij", querys, keys).softmax(dim=-1)
        result = torch.cat(torch.split(torch.matmul(scores, values), 1), dim=-1).squeeze(0)
        return F.relu(result + torch.tensordot(inputs, self.W_Res, dims=([-1], [0])))


class GRU(nn.Module):
    """A cell by hand, on a sequence of fixed length."""

    def __init__(self, inputs=5, hidden=6):
        super().__init__()
        self.W_r, self.W_z, self.W_n = (normal(inputs, hidden) for _ in range(3))
        self.U_r, self.U_z, self.U_n = (normal(hidden, hidden) for _ in range(3))
        self.b_r, self.b_z, self.b_n = (normal(hidden) for _ in range(3))

    def forward(self, x, h):
        for t in range(3):
            h = self.cell(x[:, t], h)
        return h

    def cell(self, x, h):
        r = torch.sigmoid(x @ self.W_r + h @ self.U_r + self.b_r)
        z = torch.sigmoid(x @ self.W_z + h @ self.U_z + self.b_z)
        n = torch.tanh(x @ self.W_n + r * (h @ self.U_n) + self.b_n)
        return (1 - z) * n + z * h


class CrossAttention(nn.Module):
    """MultiheadAttention with another width of keys, whose weights are apart then."""

    def __init__(self, width=8, kdim=6, heads=2):
        super().__init__()
        self.width, self.heads = width, heads
        self.q_proj_weight = normal(width, width)
        self.k_proj_weight, self.v_proj_weight = normal(width, kdim), normal(width, kdim)
        self.k_bias, self.v_bias = normal(width), normal(width)
        self.dropout = nn.Dropout(0.1)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query, key):
        q = self.heads_of(F.linear(query, self.q_proj_weight))
        k = self.heads_of(F.linear(key, self.k_proj_weight, self.k_bias))
        v = self.heads_of(F.linear(key, self.v_proj_weight, bias=self.v_bias))
        scores = self.dropout((q @ k.transpose(-2, -1)).softmax(-1))
        joined = (scores @ v).transpose(1, 2).reshape(query.size(0), -1, self.width)
        return self.out_proj(joined)

    def heads_of(self, x):
        return x.view(x.size(0), -1, self.heads, self.width // self.heads).transpose(1, 2)


class MMoE(nn.Module):
    """Experts that are layers, and gates that are raw Parameters in a list."""

    def __init__(self, inputs=6, experts=3, tasks=2):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(inputs, 4) for _ in range(experts))
        self.gates = nn.ParameterList([normal(inputs, experts) for _ in range(tasks)])
        self.towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))

    def forward(self, x):
        experts = torch.stack([expert(x).relu() for expert in self.experts])
        gates = [torch.mm(x, gate).softmax(dim=1) for gate in self.gates]
        mixed = [(gate.t().unsqueeze(2) * experts).sum(0) for gate in gates]
        return [tower(m) for tower, m in zip(self.towers, mixed, strict=True)]


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = normal(width, 6)
        self.bias = normal(width)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Heads(nn.Module):
    """Weights of several modules, of different widths."""

    def __init__(self):
        super().__init__()
        self.policy, self.value = Head(4), Head(1)

    def forward(self, x):
        return self.policy(x).softmax(-1), self.value(x).tanh()


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterDict({"gate": normal(6, 7), "up": normal(6, 7)})
        self.down = normal(7, 6)

    def forward(self, x):
        gate = torch.einsum("bsi,io->bso", x, self.scales["gate"])
        up = torch.einsum("bsi,io->bso", x, self.scales["up"])
        return torch.einsum("...i,io->...o", F.silu(gate) * up, self.down)


class LSTM(nn.Module):
    """A cell by hand, with weights the way round that PyTorch's have."""

    def __init__(self, inputs=5, hidden=6):
        super().__init__()
        self.w_i, self.w_f, self.w_g, self.w_o = (normal(hidden, inputs) for _ in range(4))
        self.u_i, self.u_f, self.u_g, self.u_o = (normal(hidden, hidden) for _ in range(4))

    def forward(self, x, h, c):
        i = torch.sigmoid(x @ self.w_i.t() + h @ self.u_i.t())
        f = torch.sigmoid(x @ self.w_f.t() + h @ self.u_f.t())
        g = torch.tanh(x @ self.w_g.t() + h @ self.u_g.t())
        o = torch.sigmoid(x @ self.w_o.t() + h @ self.u_o.t())
        c = f * c + i * g
        return o * torch.tanh(c), c


class Filters(nn.Module):
    """Learned filters that are applied by functions, and their way back."""

    def __init__(self, channels=3):
        super().__init__()
        self.fine, self.coarse = normal(4, channels, 3, 3), normal(2, channels, 3, 3)
        self.fine_bias, self.coarse_bias = normal(4), normal(2)
        self.mean, self.spread = normal(6, channels, 3, 3), normal(6, channels, 3, 3)

    def forward(self, x):
        fine = F.conv2d(x, self.fine, self.fine_bias, padding=1).relu()
        coarse = F.conv2d(x, self.coarse, self.coarse_bias, padding=1).relu()
        both = torch.cat([fine, coarse], 1) * 2
        mean = F.conv_transpose2d(both, self.mean, padding=1)
        spread = F.conv_transpose2d(both, self.spread, padding=1)
        return mean.tanh(), spread.exp()


class Nested(nn.Module):
    """Several layers, of which each is rewritten by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(AutoInt() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.shape[0] > 100:
                x = x * 2
        return x


MODELS = {
    "AutoInt": (AutoInt, [(3, 5, 8)], 6, 3),
    "GRU": (GRU, [(4, 3, 5), (4, 6)], 18, 6),
    "CrossAttention": (CrossAttention, [(3, 4, 8), (3, 5, 6)], 6, 5),
    "MMoE": (MMoE, [(5, 6)], 7, 3),
    "Heads": (Heads, [(5, 6)], 2, 1),
    "Einsum": (Einsum, [(3, 5, 6)], 3, 2),
    "LSTM": (LSTM, [(4, 5), (4, 6), (4, 6)], 8, 2),
    "Filters": (Filters, [(2, 3, 5, 6)], 4, 2),
    "Nested": (Nested, [(3, 5, 8)], 12, 6),
}
"""The model, the shapes of its inputs, and its products in a forward pass, before and after."""


@functools.cache
def _optimized(name):
    model, inputs = build(name)
    return model, inputs, conjoin.optimize(model, inputs)


def optimized(name):
    """A model of this name, its inputs and the same model optimized; copies."""
    model, inputs, fused = _optimized(name)
    return copy.deepcopy(model), inputs, copy.deepcopy(fused)


def build(name):
    """A model of this name and its inputs, in float64."""
    torch.manual_seed(0)
    model, shapes, _, _ = MODELS[name]
    return model().double(), tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)
