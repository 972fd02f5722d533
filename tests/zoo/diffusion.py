"""Diffusion models of the package `diffusers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.specimen import BATCH, Specimen, image, randn


def diffuser(
    name: str, inputs: Callable[[], dict[str, Any]], *, fuses: bool = True, **settings: Any
) -> Specimen:
    """A model with these settings.

    Args:
        name: the model's class.
        inputs: gives the keyword arguments of a call.
        fuses: whether it has siblings that can be merged.
        settings: of the model.
    """

    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**settings)

    return Specimen(build, kwargs=inputs, fuses=fuses, package="diffusers")


UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
"""The settings of a small U-Net."""

MODELS = {
    "unet": diffuser(
        "UNet2DModel",
        lambda: {"sample": image(8), "timestep": torch.tensor([3, 70])},
        **UNET,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    ),
    "unet_conditioned": diffuser(
        "UNet2DConditionModel",
        lambda: {
            "sample": image(8, 4),
            "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": randn(5, 24),
        },
        **UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
    "unet_video": diffuser(
        "UNet3DConditionModel",
        lambda: {
            "sample": randn(4, 3, 8, 8),
            "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": randn(5, 24),
        },
        **UNET,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    ),
    "unet_1d": diffuser(
        "UNet1DModel",
        lambda: {"sample": randn(2, 32), "timestep": torch.tensor([3, 70])},
        sample_size=32,
        in_channels=2,
        out_channels=2,
        extra_in_channels=32,
        block_out_channels=(16, 32, 32),
    ),
    "controlnet": diffuser(
        "ControlNetModel",
        lambda: {
            "sample": image(8, 4),
            "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": randn(5, 24),
            "controlnet_cond": image(64),
        },
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(4, 8, 8, 8),
    ),
    "autoencoder": diffuser(
        "AutoencoderKL",
        lambda: {"sample": image(16)},
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ),
    "vector_quantizer": diffuser(
        "VQModel",
        lambda: {"sample": image(16)},
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=12,
    ),
    "transformer": diffuser(
        "Transformer2DModel",
        lambda: {"hidden_states": image(4, 16), "encoder_hidden_states": randn(5, 24)},
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=2,
        cross_attention_dim=24,
        norm_num_groups=4,
    ),
    "dit": diffuser(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": image(4, 4),
            "timestep": torch.tensor([3, 70]),
            "class_labels": torch.tensor([1, 2]),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    ),
    "pixart": diffuser(
        "PixArtTransformer2DModel",
        lambda: {
            "hidden_states": image(4, 4),
            "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": randn(5, 24),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    ),
    "stable_diffusion3": diffuser(
        "SD3Transformer2DModel",
        lambda: {
            "hidden_states": image(4, 4),
            "timestep": torch.tensor([3, 70]),
            "encoder_hidden_states": randn(5, 24),
            "pooled_projections": randn(12),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=8,
    ),
    "flux": diffuser(
        "FluxTransformer2DModel",
        lambda: {
            "hidden_states": randn(4, 4),
            "timestep": torch.tensor([0.3, 0.7], dtype=torch.float64),
            "guidance": torch.tensor([2.0, 3.0], dtype=torch.float64),
            "encoder_hidden_states": randn(5, 24),
            "pooled_projections": randn(12),
            "txt_ids": torch.zeros(5, 3),
            "img_ids": torch.arange(12.0).reshape(4, 3),
        },
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ),
    "prior": diffuser(
        "PriorTransformer",
        lambda: {
            "hidden_states": randn(16),
            "timestep": torch.tensor([3, 70]),
            "proj_embedding": randn(16),
            "encoder_hidden_states": randn(5, 16),
            "attention_mask": torch.ones(BATCH, 5, dtype=torch.bool),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=16,
        num_embeddings=5,
    ),
}
