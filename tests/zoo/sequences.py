"""Networks for series and sounds, of several packages."""

from __future__ import annotations

from torch import nn

from zoo.specimen import named, public, randn, specimen


def wired() -> nn.Module:
    """A sparse closed-form continuous-time network."""
    wiring = named("ncps.wirings:AutoNCP")(10, 3)
    return named("ncps.torch:CfC")(4, wiring)


def mamba() -> nn.Module:
    config = named("mambapy.mamba:MambaConfig")(d_model=16, n_layers=2, d_state=4)
    return named("mambapy.mamba:Mamba")(config)


MODELS = {
    "closed_form": public("ncps.torch:CfC", lambda: (randn(4, 5),), 5, 6, backbone_units=8),
    "closed_form_wired": specimen(wired, lambda: (randn(4, 4),), package="ncps"),
    "liquid": public("ncps.torch:LTC", lambda: (randn(3, 4),), 4, 5, fuses=False),
    "temporal_convolutions": public(
        "pytorch_tcn:TCN",
        lambda: (randn(3, 16),),
        num_inputs=3,
        num_channels=[4, 6],
        kernel_size=3,
        use_skip_connections=True,
        use_gate=True,
        fuses=False,
    ),
    "state_spaces": specimen(mamba, lambda: (randn(6, 16),), package="mambapy", fuses=False),
    "variates_as_tokens": public(
        "iTransformer:iTransformer",
        lambda: (randn(12, 5),),
        num_variates=5,
        lookback_len=12,
        depth=2,
        dim=16,
        dim_head=8,
        heads=2,
        pred_length=(3, 4),
        flash_attn=False,
    ),
    "speech_conformer": public(
        "conformer:Conformer",
        lambda: (randn(8, 16),),
        dim=16,
        depth=2,
        dim_head=8,
        heads=2,
        conv_kernel_size=3,
    ),
    "sound_codec": public(
        "snac:SNAC",
        lambda: (randn(1, 128),),
        encoder_dim=8,
        encoder_rates=[2, 2],
        latent_dim=32,
        decoder_dim=16,
        decoder_rates=[2, 2],
        attn_window_size=None,
        codebook_size=16,
        codebook_dim=4,
        vq_strides=[2, 1],
        noise=False,
        fuses=False,
    ),
}
