"""Language models of packages beside `transformers`, and adapters on its models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.language import DECODER, text
from zoo.specimen import BATCH, Specimen, image, named, public, specimen, tokens


def curated(name: str, **settings: Any) -> Specimen:
    """A model of curated_transformers, whose layers take their q, k and v together or apart."""

    def build() -> nn.Module:
        models = "curated_transformers.models"
        family = name.removesuffix("Encoder").removesuffix("Decoder").removesuffix("CausalLM")
        config = named(f"{models}:{family}Config")(**settings)
        return named(f"{models}:{name}")(config)

    def inputs() -> tuple[Any, ...]:
        mask = named("curated_transformers.layers:AttentionMask")(torch.ones(BATCH, 6).bool())
        return tokens(), mask

    return specimen(build, inputs, package="curated_transformers")


def adapted(**settings: Any) -> nn.Module:
    """A model of transformers with trainable low-rank layers on its frozen ones."""
    import peft
    import transformers

    model = transformers.LlamaModel(transformers.LlamaConfig(**DECODER))
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    return peft.inject_adapter_in_model(config, model)


def sentences() -> nn.Module:
    """Token vectors, convolved, pooled and projected."""
    modules = named("sentence_transformers.sentence_transformer:modules")
    return nn.Sequential(
        modules.CNN(16, 8, kernel_sizes=[1, 3, 5]),
        modules.Pooling(24, "mean"),
        modules.Dense(24, 8),
    )


MODELS = {
    "curated_bert": curated(
        "BERTEncoder",
        embedding_width=16,
        hidden_width=32,
        intermediate_width=48,
        n_attention_heads=4,
        n_hidden_layers=2,
        n_pieces=40,
        n_positions=16,
    ),
    "curated_llama": curated(
        "LlamaDecoder",
        hidden_width=32,
        intermediate_width=48,
        n_query_heads=4,
        n_key_value_heads=2,
        n_hidden_layers=2,
        n_pieces=40,
        dtype=torch.float64,
    ),
    "adapted_low_rank": specimen(
        lambda: adapted(target_modules=["q_proj", "k_proj", "v_proj"]), text, package="peft"
    ),
    "adapted_dropout": specimen(
        lambda: adapted(target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1),
        text,
        package="peft",
    ),
    "adapted_decomposed": specimen(
        lambda: adapted(target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True),
        text,
        package="peft",
    ),
    "sentence_convolved": specimen(
        sentences,
        lambda: (
            {
                "token_embeddings": torch.randn(BATCH, 6, 16, dtype=torch.float64),
                "attention_mask": torch.ones(BATCH, 6),
            },
        ),
        package="sentence_transformers",
        fuses=False,
    ),
    "unet_plain": public(
        "unet:UNet2D",
        lambda: (image(16, 1),),
        in_channels=1,
        out_classes=2,
        num_encoding_blocks=2,
        out_channels_first_layer=4,
        padding=True,
        normalization="batch",
        residual=True,
        fuses=False,
    ),
}
