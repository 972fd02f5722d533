"""Networks of the package `monai`: volumes and images of medicine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.specimen import Specimen, image, named, public, randn, specimen, tokens

NETS = "monai.networks.nets"

UNET = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
"""What most of the networks ask for."""

DIFFUSION = {
    "spatial_dims": 2,
    "in_channels": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 4,
    "num_res_blocks": 1,
    "num_head_channels": 4,
}
"""The settings of a small U-Net for diffusion."""


def net(name: str, *shapes: tuple[int, ...], fuses: bool = True, **settings: Any) -> Specimen:
    """A network on tensors of these shapes."""
    return public(
        f"{NETS}.{name}" if ":" in name else f"{NETS}:{name}",
        lambda: tuple(randn(*shape) for shape in shapes),
        fuses=fuses,
        **settings,
    )


def searched() -> nn.Module:
    """A network whose branches are searched for."""
    space = named(f"{NETS}:TopologySearch")(
        channel_mul=0.25,
        num_blocks=2,
        num_depths=2,
        use_downsample=True,
        spatial_dims=2,
    )
    return named(f"{NETS}:DiNTS")(
        dints_space=space, in_channels=1, num_classes=2, use_downsample=True, spatial_dims=2
    )


def bags() -> nn.Module:
    """Several pictures to a bag; attention over them."""
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return named(f"{NETS}:MILModel")(
        num_classes=2,
        mil_mode="att",
        pretrained=False,
        backbone=backbone,
        backbone_num_features=8,
    )


MODELS = {
    "med_unet": net(
        "UNet", (1, 16, 16), **UNET, channels=(4, 8, 8), strides=(2, 2), num_res_units=2
    ),
    "med_attention_unet": net(
        "AttentionUnet", (1, 16, 16), **UNET, channels=(4, 8, 8), strides=(2, 2), fuses=False
    ),
    "med_unet_plus": net(
        "BasicUNetPlusPlus",
        (1, 32, 32),
        **UNET,
        features=(4, 4, 8, 8, 8, 4),
        deep_supervision=True,
        fuses=False,
    ),
    "med_unet_dynamic": net(
        "DynUNet",
        (1, 16, 16),
        **UNET,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(4, 8, 8),
        res_block=True,
        fuses=False,
    ),
    "med_searched": specimen(searched, lambda: (image(32, 1),), package="monai", fuses=False),
    "med_unetr": net(
        "UNETR",
        (1, 32, 32),
        in_channels=1,
        out_channels=2,
        img_size=(32, 32),
        feature_size=4,
        hidden_size=16,
        mlp_dim=16,
        num_heads=2,
        spatial_dims=2,
        fuses=False,
    ),
    "med_swin": net(
        "SwinUNETR",
        (1, 64, 64),
        in_channels=1,
        out_channels=2,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
        window_size=2,
        feature_size=12,
        spatial_dims=2,
        fuses=False,
    ),
    "med_resnet_volumes": net(
        "SegResNet",
        (1, 16, 16, 16),
        spatial_dims=3,
        init_filters=8,
        blocks_down=(1, 1, 1),
        blocks_up=(1, 1),
        fuses=False,
    ),
    "med_highres": net(
        "HighResNet",
        (1, 8, 8),
        **UNET,
        layer_params=(
            {"name": "conv_0", "n_features": 4, "kernel_size": 3},
            {"name": "res_1", "n_features": 4, "kernels": (3, 3), "repeat": 2},
            {"name": "conv_1", "n_features": 8, "kernel_size": 1},
            {"name": "conv_2", "kernel_size": 1},
        ),
        fuses=False,
    ),
    "med_mednext": net(
        "MedNeXt",
        (1, 16, 16),
        **UNET,
        init_filters=4,
        kernel_size=3,
        blocks_down=(1, 1, 1, 1),
        blocks_up=(1, 1, 1, 1),
        blocks_bottleneck=1,
        use_residual_connection=True,
        fuses=False,
    ),
    "med_restormer": net(
        "restormer:Restormer",
        (1, 16, 16),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        dim=8,
        heads=(1, 1, 2, 2),
        num_refinement_blocks=1,
        fuses=False,
    ),
    "med_autoencoder": net(
        "AutoencoderKL",
        (1, 16, 16),
        spatial_dims=2,
        num_res_blocks=(1, 1),
        channels=(8, 16),
        attention_levels=(False, True),
        norm_num_groups=4,
    ),
    "med_diffusion": public(
        f"{NETS}:DiffusionModelUNet",
        lambda: {
            "x": image(16, 1),
            "timesteps": torch.tensor([3, 70]),
            "context": randn(4, 6),
        },
        **DIFFUSION,
        out_channels=1,
        with_conditioning=True,
        cross_attention_dim=6,
    ),
    "med_controlnet": public(
        f"{NETS}:ControlNet",
        lambda: {
            "x": image(16, 1),
            "timesteps": torch.tensor([3, 70]),
            "controlnet_cond": image(32, 1),
        },
        **DIFFUSION,
        conditioning_embedding_num_channels=(4, 8),
    ),
    "med_diffusion_spade": public(
        f"{NETS}:SPADEDiffusionModelUNet",
        lambda: {"x": image(16, 1), "timesteps": torch.tensor([3, 70]), "seg": image(16, 3)},
        **DIFFUSION,
        out_channels=1,
        label_nc=3,
        spade_intermediate_channels=4,
    ),
    "med_spade": net(
        "SPADENet",
        (3, 16, 16),
        (1, 16, 16),
        **{**UNET, "out_channels": 1},
        label_nc=3,
        input_shape=(16, 16),
        channels=[8, 4],
        z_dim=4,
        spade_intermediate_channels=4,
    ),
    "med_tokens": public(
        f"{NETS}:DecoderOnlyTransformer",
        lambda: {"x": tokens(), "context": randn(3, 16)},
        num_tokens=40,
        max_seq_len=8,
        attn_layers_dim=16,
        attn_layers_depth=2,
        attn_layers_heads=2,
        with_cross_attention=True,
    ),
    "med_registration": net(
        "LocalNet",
        (2, 16, 16),
        spatial_dims=2,
        in_channels=2,
        out_channels=2,
        num_channel_initial=4,
        extract_levels=(0, 1, 2),
        fuses=False,
    ),
    "med_bags": specimen(bags, lambda: (randn(3, 3, 8, 8),), package="monai", fuses=False),
    "med_masked": net(
        "MaskedAutoEncoderViT",
        (1, 16, 16),
        in_channels=1,
        img_size=16,
        patch_size=4,
        hidden_size=16,
        mlp_dim=16,
        num_layers=1,
        num_heads=2,
        decoder_hidden_size=16,
        decoder_mlp_dim=16,
        decoder_num_layers=1,
        decoder_num_heads=2,
        spatial_dims=2,
        fuses=False,
    ),
    "med_discriminators": net(
        "MultiScalePatchDiscriminator",
        (1, 32, 32),
        num_d=2,
        num_layers_d=1,
        spatial_dims=2,
        channels=4,
        in_channels=1,
        minimum_size_im=16,
    ),
}
