"""Critics and actors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models.by_hand import Stacked, apart, joined


class TwinCritics(nn.Module):
    """Two equal critics, as in TD3 and SAC: x (batch, state and action) -> two values."""

    def __init__(self, inputs: int = 24, width: int = 256) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(
                nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                nn.Linear(width, 1),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> list[Tensor]:
        return [critic(x) for critic in self.critics]


class WideTwinCritics(nn.Module):
    def __init__(self, plain: TwinCritics) -> None:
        super().__init__()
        first, _, second, _, last = zip(*plain.critics, strict=True)
        self.first = joined(first, nn.Linear(first[0].in_features, 2 * first[0].out_features))
        self.second, self.last = Stacked(second), Stacked(last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = apart(torch.relu(self.first(x)), 2)
        return self.last(torch.relu(self.second(h))).unbind()


class ActorCritic(nn.Module):
    """The small networks of PPO: x (batch, state) -> logits of the actions, and a value."""

    def __init__(self, inputs: int = 8, width: int = 64, actions: int = 4) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(
                nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                nn.Linear(width, out),
            )
            for out in (actions, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(x), self.critic(x)


class WideActorCritic(nn.Module):
    def __init__(self, plain: ActorCritic) -> None:
        super().__init__()
        first = plain.actor[0], plain.critic[0]
        self.first = joined(first, nn.Linear(first[0].in_features, 2 * first[0].out_features))
        self.second = Stacked([plain.actor[2], plain.critic[2]])
        self.actor, self.critic = plain.actor[4], plain.critic[4]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = apart(torch.tanh(self.first(x)), 2)
        actor, critic = torch.tanh(self.second(h)).unbind()
        return self.actor(actor), self.critic(critic)
