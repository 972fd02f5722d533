"""Experts and their gates, towers for several tasks, and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.models.by_hand import Stacked, apart, joined


class MMoE(nn.Module):
    """Multi-gate mixture of experts: x (batch, width) -> one score for each task."""

    def __init__(self, experts: int, tasks: int = 2, width: int = 64) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
            for _ in range(experts)
        )
        self.gates = nn.ModuleList(nn.Linear(width, experts, bias=False) for _ in range(tasks))
        self.towers = nn.ModuleList(nn.Linear(16, 1) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = torch.stack([expert(x) for expert in self.experts], 1)
        gates = [gate(x).softmax(-1) for gate in self.gates]
        mixed = [(gate.unsqueeze(-1) * experts).sum(1) for gate in gates]
        return [tower(y) for tower, y in zip(self.towers, mixed, strict=True)]


class WideMMoE(nn.Module):
    def __init__(self, plain: MMoE) -> None:
        super().__init__()
        self.count, self.tasks = len(plain.experts), len(plain.gates)
        first, _, second, _ = zip(*plain.experts, strict=True)
        width = first[0].in_features
        self.first = joined(first, nn.Linear(width, 32 * self.count))
        self.second, self.towers = Stacked(second), Stacked(plain.towers)
        gates = nn.Linear(width, self.tasks * self.count, bias=False)
        self.gates = joined(plain.gates, gates)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        experts = torch.relu(self.second(apart(torch.relu(self.first(x)), self.count)))
        gates = apart(self.gates(x), self.tasks).softmax(-1)
        mixed = torch.einsum("tbe,ebo->tbo", gates, experts)
        return self.towers(mixed).unbind()


class MultiTask(nn.Module):
    """A shared bottom and a tower for each task: x (batch, width) -> a score for each."""

    def __init__(self, tasks: int = 8, width: int = 128) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(width, 256), nn.ReLU())
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1)) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        shared = self.bottom(x)
        return [tower(shared) for tower in self.towers]


class WideMultiTask(nn.Module):
    def __init__(self, plain: MultiTask) -> None:
        super().__init__()
        self.bottom, self.count = plain.bottom, len(plain.towers)
        first, _, last = zip(*plain.towers, strict=True)
        self.first, self.last = joined(first, nn.Linear(256, 64 * self.count)), Stacked(last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = torch.relu(self.first(self.bottom(x)))
        return self.last(apart(h, self.count)).unbind()


class NeuMF(nn.Module):
    """Neural collaborative filtering: users and items have two embeddings each, of one index."""

    def __init__(self, users: int = 5000, items: int = 2000, width: int = 32) -> None:
        super().__init__()
        self.user_product, self.user_mlp = (nn.Embedding(users, width) for _ in range(2))
        self.item_product, self.item_mlp = (nn.Embedding(items, width) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.score = nn.Linear(width + 32, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.user_product(user) * self.item_product(item)
        hidden = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], -1))
        return self.score(torch.cat([product, hidden], -1))


class WideNeuMF(nn.Module):
    def __init__(self, plain: NeuMF) -> None:
        super().__init__()
        self.mlp, self.score = plain.mlp, plain.score
        users, width = plain.user_mlp.weight.shape
        items = plain.item_mlp.num_embeddings
        of_users, of_items = nn.Embedding(users, 2 * width), nn.Embedding(items, 2 * width)
        self.user = joined([plain.user_product, plain.user_mlp], of_users, 1)
        self.item = joined([plain.item_product, plain.item_mlp], of_items, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        (user_product, user_mlp), (item_product, item_mlp) = (
            self.user(user).chunk(2, -1),
            self.item(item).chunk(2, -1),
        )
        hidden = self.mlp(torch.cat([user_mlp, item_mlp], -1))
        return self.score(torch.cat([user_product * item_product, hidden], -1))


class DLRM(nn.Module):
    """Tables that read an index each, which run as one with offsets."""

    def __init__(self, tables: int = 16, rows: int = 1000, width: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, width), nn.ReLU())
        self.top = nn.Sequential(
            nn.Linear(width + (tables + 1) ** 2, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def embedded(self, index: Tensor) -> list[Tensor]:
        return [table(index[:, i]) for i, table in enumerate(self.tables)]

    def forward(self, dense: Tensor, index: Tensor) -> Tensor:
        dense = self.bottom(dense)
        features = torch.stack([dense, *self.embedded(index)], 1)
        pairs = features @ features.transpose(1, 2)
        return self.top(torch.cat([dense, pairs.flatten(1)], 1))


class WideDLRM(DLRM):
    """One table below another, and indices that are moved down accordingly."""

    def __init__(self, plain: DLRM) -> None:
        nn.Module.__init__(self)
        self.bottom, self.top = plain.bottom, plain.top
        rows, width = plain.tables[0].weight.shape
        self.table = joined(plain.tables, nn.Embedding(rows * len(plain.tables), width))
        self.register_buffer("first", torch.arange(len(plain.tables)) * rows)

    def forward(self, dense: Tensor, index: Tensor) -> Tensor:
        dense = self.bottom(dense)
        features = torch.cat([dense.unsqueeze(1), self.table(index + self.first)], 1)
        pairs = features @ features.transpose(1, 2)
        return self.top(torch.cat([dense, pairs.flatten(1)], 1))
