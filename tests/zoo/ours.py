"""Small models of the kinds that conjoin is for, which need no other package."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.specimen import Specimen, image, randn, tokens


class VAE(nn.Module):
    """Convolutional encoder with two heads, and a decoder; heads for images of 28x28."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU()
        )
        self.mean = nn.Conv2d(8, 4, 2)
        self.log_var = nn.Conv2d(8, 4, 2)
        self.decoder = nn.Linear(400, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.mean(features).flatten(1), self.log_var(features).flatten(1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.encode(x)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return {"image": self.decoder(z).sigmoid(), "mean": mean, "log_var": log_var}


class ActorCritic(nn.Module):
    """Policy and value towers on one observation."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        self.critic = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, observation: Tensor) -> tuple[torch.distributions.Normal, Tensor]:
        mean = self.actor(observation)
        policy = torch.distributions.Normal(mean, self.log_std.exp().expand_as(mean))
        return policy, self.critic(observation).squeeze(-1)


class TwinCritics(nn.Module):
    """Two Q functions that read one tensor made by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 1))
            for _ in range(2)
        )

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([state, action], dim=1)
        return self.first(x), self.second(x)


class MMoE(nn.Module):
    """Multi-gate mixture of experts: experts, gates and towers."""

    def __init__(self, experts: int = 4, tasks: int = 2) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 6))
            for _ in range(experts)
        )
        self.gates = nn.ModuleList(nn.Linear(10, experts, bias=False) for _ in range(tasks))
        self.towers = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        gates = [gate(x).softmax(dim=-1) for gate in self.gates]
        mixed = [torch.einsum("be,bed->bd", gate, experts) for gate in gates]
        return [tower(m) for tower, m in zip(self.towers, mixed, strict=True)]


class Convolution(nn.Module):
    """Convolution, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """The block with three 1x1 convolutions on its input, and one behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1 = Convolution(8, 6)
        self.branch3 = nn.Sequential(Convolution(8, 4), Convolution(4, 6, 3))
        self.branch5 = nn.Sequential(Convolution(8, 2), Convolution(2, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), Convolution(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.pool(x)], dim=1)


class Attention(nn.Module):
    """Grouped-query attention, with an optional mask and a cache of its last keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16, bias=False)
        self.k = nn.Linear(16, 8, bias=False)
        self.v = nn.Linear(16, 8, bias=False)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        self.last_keys = k.detach()
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).flatten(2))


class Heads(nn.Module):
    """Heads that are called together on every level of a pyramid, as detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Conv2d(4, 6, 3, padding=1)
        self.boxes = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        levels = [x, F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]
        return [(self.classes(level), self.boxes(level)) for level in levels]


class Tables(nn.Module):
    """Embeddings of one sequence: wide and deep."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Embedding(40, 8, padding_idx=0)
        self.also = nn.Embedding(40, 8, padding_idx=0)
        self.wide = nn.Embedding(40, 1)
        self.bias = nn.Embedding(40, 3)

    def forward(self, items: Tensor) -> tuple[Tensor, ...]:
        return self.deep(items) * self.also(items), self.wide(items), self.bias(items)


class Upsampler(nn.Module):
    """Transposed convolutions and 1-d and 3-d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.ConvTranspose2d(3, n, 2, stride=2) for n in (4, 5))
        self.lines = nn.ModuleList(nn.Conv1d(6, 4, 3, padding="same") for _ in range(2))
        self.volumes = nn.ModuleList(
            nn.Conv3d(1, n, 3, padding_mode="circular", padding=1) for n in (2, 3)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        line, volume = x.flatten(2).repeat(1, 2, 1), x.unsqueeze(1)
        return [
            *(up(x) for up in self.up),
            *(conv(line) for conv in self.lines),
            *(conv(volume) for conv in self.volumes),
        ]


class Cells(nn.Module):
    """Four gates in a loop over time, on the input and on the state."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict({gate: nn.Linear(5, 7) for gate in "ifgo"})
        self.states = nn.ModuleDict({gate: nn.Linear(7, 7, bias=False) for gate in "ifgo"})

    def forward(self, sequence: Tensor) -> Tensor:
        h = c = sequence.new_zeros(len(sequence), 7)
        for x in sequence.unbind(1):
            i, f, g, o = (self.inputs[gate](x) + self.states[gate](h) for gate in "ifgo")
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h


MODELS = {
    "vae": Specimen(VAE, lambda: (image(28, 1),)),
    "actor_critic": Specimen(ActorCritic, lambda: (randn(6),)),
    "twin_critics": Specimen(TwinCritics, lambda: (randn(5), randn(3))),
    "mmoe": Specimen(MMoE, lambda: (randn(10),)),
    "inception_block": Specimen(Inception, lambda: (image(6, 8),)),
    "attention": Specimen(Attention, lambda: (randn(5, 16),)),
    "pyramid_heads": Specimen(Heads, lambda: (image(8, 4),)),
    "tables": Specimen(Tables, lambda: (tokens(),)),
    "all_convolutions": Specimen(Upsampler, lambda: (image(4),)),
    "recurrent_cells": Specimen(Cells, lambda: (randn(4, 5),)),
}
