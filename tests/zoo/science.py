"""Networks for proteins, molecules and graphs, of several packages."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from zoo.specimen import Specimen, named, public, specimen, tokens

NODES = 6

EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 2, 4, 1, 3], [1, 2, 3, 4, 5, 0, 2, 4, 0, 3, 5]])
"""A graph on six nodes: from, to."""


def nodes(width: int = 8) -> Tensor:
    """Features of the nodes."""
    return torch.randn(NODES, width, dtype=torch.float64)


def batch() -> Tensor:
    """The graph that each node belongs to."""
    return torch.tensor([0, 0, 0, 1, 1, 1])


def graph(name: str, *args: Any, fuses: bool = False, **settings: Any) -> Specimen:
    """A network of torch_geometric on a graph's nodes and edges. Its layers are its own mostly."""
    return public(
        f"torch_geometric.nn.models:{name}",
        lambda: {"x": nodes(), "edge_index": EDGES},
        *args,
        fuses=fuses,
        **settings,
    )


def pooled(name: str, *, fuses: bool = False, **settings: Any) -> Specimen:
    """The same, where the call says which graph a node belongs to."""
    return public(
        f"torch_geometric.nn.models:{name}",
        lambda: {"x": nodes(), "edge_index": EDGES, "batch": torch.zeros(NODES, dtype=torch.long)},
        in_channels=8,
        hidden_channels=8,
        out_channels=3,
        fuses=fuses,
        **settings,
    )


class Everything(nn.Module):
    """Every node is a neighbour of every other."""

    def forward(self, positions: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        n = len(positions)
        pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & (batch[pairs[:, 0]] == batch[pairs[:, 1]])].T
        return pairs, (positions[pairs[0]] - positions[pairs[1]]).norm(dim=-1)


def variational() -> nn.Module:
    """A variational graph autoencoder; two graph convolutions give mean and deviation."""
    import torch_geometric.nn as geometric

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = geometric.GCNConv(8, 8)
            self.mean, self.deviation = (geometric.GCNConv(8, 4) for _ in range(2))

        def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            x = self.first(x, edges).relu()
            return self.mean(x, edges), self.deviation(x, edges)

    return geometric.VGAE(Encoder())


def protein(name: str, **settings: Any) -> nn.Module:
    alphabet = named("esm.data:Alphabet").from_architecture(name)
    if name == "ESM-1b":
        return named("esm.model.esm2:ESM2")(2, 16, 4, alphabet, **settings)
    return named("esm.model.msa_transformer:MSATransformer")(
        argparse.Namespace(
            layers=1,
            embed_dim=16,
            logit_bias=True,
            ffn_embed_dim=16,
            attention_heads=4,
            dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.1,
            max_tokens=64,
            max_positions=16,
            embed_positions_msa=True,
            embed_positions_msa_dim=16,
        ),
        alphabet,
    )


MODELS = {
    "graph_attention": graph("GAT", 8, 8, 2, 3, heads=2, dropout=0.1),
    "graph_aggregators": graph(
        "PNA",
        8,
        8,
        2,
        3,
        aggregators=["mean", "max"],
        scalers=["identity", "amplification"],
        deg=torch.tensor([0, 3, 2, 1]),
    ),
    "graph_pyramid": graph("GraphUNet", 8, 8, 3, depth=2),
    "graph_links": public(
        "torch_geometric.nn.models:LINKX",
        lambda: {"x": nodes(), "edge_index": EDGES},
        NODES,
        8,
        8,
        3,
        num_layers=2,
        fuses=False,
    ),
    "graph_polynomial_former": pooled(
        "Polynormer", fuses=True, local_layers=2, heads=2, local_attn=True
    ),
    "graph_fingerprint": graph("NeuralFingerprint", 8, 8, 3, num_layers=2),
    "molecule_attention": public(
        "torch_geometric.nn.models:AttentiveFP",
        lambda: {
            "x": nodes(),
            "edge_index": EDGES,
            "edge_attr": torch.randn(EDGES.shape[1], 4, dtype=torch.float64),
            "batch": batch(),
        },
        8,
        8,
        3,
        edge_dim=4,
        num_layers=2,
        num_timesteps=2,
        fuses=False,
    ),
    "molecule_filters": public(
        "torch_geometric.nn.models:SchNet",
        lambda: (
            torch.randint(1, 9, (NODES,)),
            torch.randn(NODES, 3, dtype=torch.float64),
            batch(),
        ),
        hidden_channels=16,
        num_filters=8,
        num_interactions=2,
        num_gaussians=6,
        interaction_graph=Everything(),
    ),
    "protein_language": specimen(
        lambda: protein("ESM-1b"),
        lambda: {"tokens": tokens(8, 20), "repr_layers": [1, 2], "return_contacts": True},
        package="esm",
    ),
    "protein_alignment": specimen(
        lambda: protein("MSA Transformer"),
        lambda: {"tokens": tokens(12, 20).unflatten(1, (3, 4)), "return_contacts": True},
        package="esm",
    ),
}
