"""Networks for tables, of several packages."""

from __future__ import annotations

import torch
from torch import nn

from zoo.specimen import BATCH, named, public, randn, specimen


def categories(columns: int = 2) -> torch.Tensor:
    """Numbers of categories, below three."""
    return torch.randint(0, 3, (BATCH, columns))


def embedded() -> nn.Module:
    """An ensemble with periodic embeddings of its numbers."""
    periodic = named("rtdl_num_embeddings:PeriodicEmbeddings")
    return named("tabm:TabM")(
        n_num_features=4,
        cat_cardinalities=[3, 3],
        d_out=2,
        num_embeddings=periodic(4, d_embedding=6, n_frequencies=4, lite=False),
        k=3,
        n_blocks=2,
        d_block=12,
        dropout=0.1,
        arch_type="tabm",
        start_scaling_init="random-signs",
    )


MODELS = {
    "table_feature_transformer": public(
        "rtdl_revisiting_models:FTTransformer",
        lambda: (randn(4), categories()),
        n_cont_features=4,
        cat_cardinalities=[3, 3],
        d_out=2,
        n_blocks=2,
        d_block=16,
        attention_n_heads=2,
        attention_dropout=0.1,
        ffn_d_hidden=None,
        ffn_d_hidden_multiplier=2.0,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    ),
    "table_resnet": public(
        "rtdl_revisiting_models:ResNet",
        lambda: (randn(4),),
        d_in=4,
        d_out=2,
        n_blocks=2,
        d_block=8,
        d_hidden=None,
        d_hidden_multiplier=2.0,
        dropout1=0.1,
        dropout2=0.0,
        fuses=False,
    ),
    "table_ensemble": specimen(
        embedded, lambda: (randn(4), categories()), package="tabm", fuses=False
    ),
    "table_sequential_attention": public(
        "pytorch_tabnet.tab_network:TabNet",
        lambda: (randn(6),),
        input_dim=6,
        output_dim=[2, 3],
        n_d=4,
        n_a=4,
        n_steps=2,
        group_attention_matrix=torch.eye(6, dtype=torch.float64),
        mask_type="entmax",
    ),
    "table_transformer": public(
        "tab_transformer_pytorch:TabTransformer",
        lambda: (categories(), randn(4)),
        categories=(3, 3),
        num_continuous=4,
        dim=16,
        depth=2,
        heads=2,
        dim_head=8,
        dim_out=2,
        mlp_act=nn.ReLU(),
        fuses=False,
    ),
    "table_transformer_all": public(
        "tab_transformer_pytorch:FTTransformer",
        lambda: (categories(), randn(4)),
        categories=(3, 3),
        num_continuous=4,
        dim=16,
        depth=2,
        heads=2,
        dim_head=8,
        dim_out=2,
        fuses=False,
    ),
}
