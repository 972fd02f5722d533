"""Transformers and their kin from small packages of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.specimen import Specimen, image, named, public, randn, specimen, tokens

DECODER = "x_transformers:Decoder"
ENCODER = "x_transformers:Encoder"

LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
"""The settings of the layers of x_transformers."""

ATTENTION = {"dim": 32, "depth": 2, "heads": 4, "dim_head": 8}
"""The settings by the names that the other packages of that author give them."""


def stack(kind: str, **settings: Any) -> Specimen:
    """A language model of x_transformers around a stack of layers with these settings."""

    def build() -> nn.Module:
        return named("x_transformers:TransformerWrapper")(
            num_tokens=40, max_seq_len=16, attn_layers=named(kind)(**{**LAYERS, **settings})
        )

    return specimen(build, lambda: (tokens(),), package="x_transformers")


def frames() -> dict[str, Tensor]:
    """Five residues: what is known of each and of each pair, and where they are."""
    return {
        "single_repr": randn(5, 16),
        "pairwise_repr": randn(5, 5, 8),
        "rotations": torch.linalg.qr(randn(5, 3, 3))[0],
        "translations": randn(5, 3),
    }


def vision_transformer() -> nn.Module:
    return named("x_transformers:ViTransformerWrapper")(
        image_size=16, patch_size=8, num_classes=3, attn_layers=named(ENCODER)(**LAYERS)
    )


def series() -> nn.Module:
    return named("x_transformers:ContinuousTransformerWrapper")(
        dim_in=5,
        dim_out=3,
        max_seq_len=16,
        attn_layers=named(DECODER)(**LAYERS, rotary_pos_emb=True),
    )


class Translator(nn.Module):
    """An encoder, and a decoder that attends to it; returns the logits."""

    def __init__(self) -> None:
        super().__init__()
        wrapper = named("x_transformers:TransformerWrapper")
        self.encoder, self.decoder = (
            wrapper(num_tokens=40, max_seq_len=16, attn_layers=named(kind)(**LAYERS, **settings))
            for kind, settings in ((ENCODER, {}), (DECODER, {"cross_attend": True}))
        )

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        context = self.encoder(source, return_embeddings=True)
        return self.decoder(target, context=context)


X_TRANSFORMERS = {
    "x_decoder": stack(DECODER),
    "x_encoder_relative": stack(ENCODER, rel_pos_bias=True, use_scalenorm=True),
    "x_rotary_gated": stack(DECODER, rotary_pos_emb=True, ff_glu=True, attn_gate_values=True),
    "x_alibi_grouped": stack(DECODER, alibi_pos_bias=True, attn_kv_heads=2, use_rmsnorm=True),
    "x_single_keys": stack(DECODER, attn_kv_heads=1, attn_qk_norm=True, macaron=True),
    "x_hyper_connections": stack(DECODER, num_residual_streams=2),
    "x_value_residual": stack(ENCODER, add_value_residual=True),
    "x_memory_keys": stack(ENCODER, attn_num_mem_kv=3, attn_on_attn=True),
    "x_translator": specimen(Translator, lambda: (tokens(), tokens(5)), package="x_transformers"),
    "x_vision": specimen(vision_transformer, lambda: (image(16),), package="x_transformers"),
    "x_series": specimen(series, lambda: (randn(7, 5),), package="x_transformers"),
}

MODELS = {
    **X_TRANSFORMERS,
    "perceiver_images": public(
        "perceiver_pytorch:Perceiver",
        lambda: (randn(6, 6, 3),),
        num_freq_bands=3,
        depth=2,
        max_freq=4.0,
        num_latents=5,
        latent_dim=16,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        num_classes=3,
    ),
    "perceiver_io": public(
        "perceiver_pytorch:PerceiverIO",
        lambda: {"data": randn(6, 12), "queries": randn(4, 10)},
        depth=2,
        dim=12,
        queries_dim=10,
        logits_dim=5,
        num_latents=5,
        latent_dim=16,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        decoder_ff=True,
    ),
    "performer": public(
        "performer_pytorch:PerformerLM",
        lambda: (tokens(8),),
        num_tokens=40,
        max_seq_len=8,
        **ATTENTION,
        nb_features=6,
        ff_glu=True,
        causal=False,
    ),
    "linear_attention": public(
        "linear_attention_transformer:LinearAttentionTransformerLM",
        lambda: (tokens(8),),
        num_tokens=40,
        max_seq_len=8,
        **ATTENTION,
        n_local_attn_heads=2,
        local_attn_window_size=4,
        use_axial_pos_emb=False,
        use_rotary_emb=True,
        ff_glu=True,
    ),
    "nystromformer": public(
        "nystrom_attention:Nystromformer",
        lambda: (randn(8, 32),),
        **ATTENTION,
        num_landmarks=4,
        attn_values_residual_conv_kernel=3,
        fuses=False,
    ),
    "gated_mlp": public(
        "g_mlp_pytorch:gMLP",
        lambda: (tokens(8),),
        num_tokens=40,
        dim=16,
        depth=2,
        seq_len=8,
        attn_dim=8,
        heads=2,
        causal=True,
        fuses=False,
    ),
    "mixer": public(
        "mlp_mixer_pytorch:MLPMixer",
        lambda: (image(16),),
        image_size=16,
        channels=3,
        patch_size=8,
        dim=16,
        depth=2,
        num_classes=3,
        fuses=False,
    ),
    "permutator": public(
        "mlp_mixer_pytorch.permutator:Permutator",
        lambda: (image(16),),
        image_size=16,
        patch_size=4,
        dim=16,
        depth=2,
        num_classes=3,
        segments=4,
        fuses=False,
    ),
    "soft_experts": public(
        "soft_moe_pytorch:SoftMoE",
        lambda: (randn(6, 16),),
        dim=16,
        seq_len=6,
        num_experts=3,
        fuses=False,
    ),
    "slot_attention": public(
        "slot_attention:SlotAttention", lambda: (randn(6, 16),), num_slots=3, dim=16, hidden_dim=16
    ),
    "slot_attention_heads": public(
        "slot_attention:MultiHeadSlotAttention",
        lambda: (randn(6, 16),),
        num_slots=3,
        dim=16,
        heads=2,
    ),
    "bottleneck_attention": public(
        "bottleneck_transformer_pytorch:BottleStack",
        lambda: (image(8, 8),),
        dim=8,
        fmap_size=8,
        dim_out=16,
        heads=2,
        dim_head=4,
        num_layers=2,
        rel_pos_emb=True,
        fuses=False,
    ),
    "experts_routed": public(
        "mixture_of_experts:MoE",
        lambda: (randn(6, 16),),
        dim=16,
        num_experts=3,
        hidden_dim=12,
        fuses=False,
    ),
    "axial_image": public(
        "axial_attention:AxialImageTransformer",
        lambda: (image(4, 8),),
        dim=8,
        depth=2,
        heads=2,
        reversible=False,
    ),
    "lambda_layer": public(
        "lambda_networks:LambdaLayer",
        lambda: (image(6, 8),),
        dim=8,
        dim_out=8,
        r=3,
        dim_k=4,
        heads=2,
        dim_u=1,
    ),
    "set_attention": public(
        "isab_pytorch:ISAB", lambda: (randn(6, 16),), dim=16, heads=2, num_latents=3
    ),
    "chunked_attention": public(
        "memory_efficient_attention_pytorch:Attention",
        lambda: (randn(8, 16),),
        dim=16,
        heads=2,
        dim_head=8,
        memory_efficient=True,
        q_bucket_size=4,
        k_bucket_size=4,
    ),
    "graph_transformer": public(
        "graph_transformer_pytorch:GraphTransformer",
        lambda: (randn(5, 16), randn(5, 5, 8)),
        dim=16,
        depth=1,
        edge_dim=8,
        dim_head=8,
        heads=2,
        with_feedforwards=True,
        gated_residual=True,
        rel_pos_emb=True,
    ),
    "invariant_points": public(
        "invariant_point_attention:InvariantPointAttention",
        frames,
        dim=16,
        heads=2,
        scalar_key_dim=4,
        scalar_value_dim=4,
        point_key_dim=2,
        point_value_dim=2,
        pairwise_repr_dim=8,
    ),
}
