"""Transformers of the package `transformers`: text, images, sound, and mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.specimen import BATCH, Specimen, image, randn, tokens

TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
"""The settings that most text models call by these names."""

DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0}
"""Decoders with grouped-query attention."""

MIXTURE = {**DECODER, "experts_implementation": "eager"}
"""Mixtures of experts; the other implementations do not run in float64."""

PICTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
"""The settings of a vision transformer."""


def hugging(
    name: str, inputs: Callable[[], dict[str, Any]], *, fuses: bool = True, **settings: Any
) -> Specimen:
    """A model with the configuration that belongs to it.

    Args:
        name: the model's class.
        inputs: gives the keyword arguments of a call.
        fuses: whether it has siblings that can be merged.
        settings: of the configuration.
    """

    def build() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**settings))
        if hasattr(model, "freeze_feature_encoder"):
            model.freeze_feature_encoder()  # Otherwise it changes flags of the input itself.
        return model

    return Specimen(build, kwargs=inputs, fuses=fuses, package="transformers")


def text(length: int = 6) -> dict[str, Any]:
    """Token numbers, and a mask that hides the end of one sequence."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": tokens(length), "attention_mask": mask}


def pair() -> dict[str, Any]:
    """Token numbers for an encoder and a decoder."""
    return {**text(), "decoder_input_ids": tokens(4)}


def picture() -> dict[str, Any]:
    return {"pixel_values": image(16)}


MODELS = {
    "bert": hugging("BertModel", text, **TEXT),
    "bert_classifier": hugging("BertForSequenceClassification", text, **TEXT),
    "roberta_masked": hugging("RobertaForMaskedLM", text, **TEXT),
    "albert": hugging("AlbertModel", text, **TEXT, embedding_size=16),
    "electra": hugging("ElectraModel", text, **TEXT, embedding_size=16),
    "distilbert": hugging(
        "DistilBertModel", text, vocab_size=40, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    ),
    "deberta": hugging(
        "DebertaV2Model", text, **TEXT, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "longformer": hugging(
        "LongformerModel", lambda: text(8), **TEXT, attention_window=4, pad_token_id=0
    ),
    # Its q, k and v are convolutions with groups.
    "squeezebert": hugging(
        "SqueezeBertModel", text, **{**TEXT, "num_hidden_layers": 1}, embedding_size=32
    ),
    "gpt2": hugging(
        "GPT2LMHeadModel",
        text,
        fuses=False,  # q, k and v are one layer already.
        vocab_size=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neo": hugging(
        "GPTNeoModel",
        text,
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "opt": hugging("OPTModel", text, **TEXT, ffn_dim=48, word_embed_proj_dim=32),
    "llama": hugging("LlamaForCausalLM", text, **DECODER),
    "llama_cached": hugging("LlamaForCausalLM", text, **{**DECODER, "use_cache": True}),
    "mistral": hugging("MistralModel", text, **DECODER, sliding_window=4),
    "qwen3": hugging("Qwen3Model", text, **DECODER, head_dim=8),
    "gemma2": hugging("Gemma2Model", text, **DECODER, head_dim=8),
    "phi": hugging("PhiModel", text, **DECODER),
    "mixtral": hugging("MixtralForCausalLM", text, **MIXTURE, num_local_experts=3),
    "qwen2_moe": hugging(
        "Qwen2MoeModel",
        text,
        **MIXTURE,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "deepseek": hugging(
        "DeepseekV3Model",
        text,
        **{**MIXTURE, "num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "t5": hugging(
        "T5ForConditionalGeneration",
        pair,
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "bart": hugging(
        "BartModel",
        pair,
        vocab_size=40,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
    ),
    "mamba": hugging(
        "MambaModel",
        lambda: {"input_ids": tokens()},
        fuses=False,  # One projection gives all that it needs.
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
    ),
    "vit": hugging("ViTModel", picture, **PICTURE),
    "dinov2": hugging("Dinov2Model", picture, **PICTURE, mlp_ratio=2),
    "swin": hugging(
        "SwinModel",
        lambda: {"pixel_values": image(32)},
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "segformer": hugging(
        "SegformerForSemanticSegmentation",
        lambda: {"pixel_values": image(32)},
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=16,
    ),
    "clip": hugging(
        "CLIPModel",
        lambda: {**text(), **picture()},
        text_config={**TEXT, "bos_token_id": 2, "eos_token_id": 3},
        vision_config=PICTURE,
        projection_dim=16,
    ),
    "whisper": hugging(
        "WhisperModel",
        lambda: {"input_features": randn(8, 20), "decoder_input_ids": tokens(4)},
        vocab_size=40,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ),
    "wav2vec2": hugging(
        "Wav2Vec2Model",
        lambda: {"input_values": randn(400)},
        **TEXT,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    ),
    "perceiver": hugging(
        "PerceiverModel",
        lambda: {"inputs": randn(6, 16)},
        d_model=16,
        d_latents=24,
        num_latents=5,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    ),
    "layoutlm": hugging(
        "LayoutLMModel",
        lambda: {**text(), "bbox": tokens(24, 20).reshape(BATCH, 6, 4).cumsum(-1)},
        **TEXT,
        max_2d_position_embeddings=128,
    ),
}
