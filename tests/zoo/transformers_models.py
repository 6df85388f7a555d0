"""Hugging Face transformers, from small configurations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import nn

from tests.zoo.entries import Call, Entry, Zoo, floats, keywords, tokens

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {**TEXT, "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
READ = {"input_ids": tokens(2, 7), "attention_mask": tokens(2, 7, high=4) // 3}
LABELLED = {**READ, "labels": tokens(2, 7, seed=1)}
PICTURE = {"pixel_values": floats(2, 3, 32, 32)}
SEEN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32}
STAGES = {"depths": [1, 1, 1, 1], "image_size": 32}
ENCODER_DECODER = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
}
SPEECH = {
    **TEXT,
    "conv_dim": [8, 8],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
}
MODELS: dict[str, tuple[dict[str, Any], Callable[[], Call]]] = {
    "AlbertModel": ({**TEXT, "embedding_size": 8}, keywords(**READ)),
    "TimeSeriesTransformerForPrediction": (
        {"prediction_length": 4, "context_length": 8, "d_model": 8, "num_time_features": 1, "lags_sequence": [1, 2]},
        keywords(
            past_values=floats(2, 10),
            past_time_features=floats(2, 10, 1),
            past_observed_mask=floats(2, 10) * 0 + 1,
            future_values=floats(2, 4),
            future_time_features=floats(2, 4, 1),
        ),
    ),
    "BartForConditionalGeneration": (ENCODER_DECODER, keywords(**LABELLED)),
    "BertForSequenceClassification": (TEXT, keywords(**READ)),
    "BertModel": (TEXT, keywords(**READ)),
    "CLIPModel": (
        {
            "text_config": {**TEXT, **SPECIAL, "max_position_embeddings": 16},
            "vision_config": {**SEEN, "patch_size": 8},
            "projection_dim": 8,
        },
        keywords(**READ, **PICTURE),
    ),
    "ConvNextForImageClassification": ({**STAGES, "hidden_sizes": [8, 8, 16, 16]}, keywords(**PICTURE)),
    "DebertaV2Model": ({**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, keywords(**READ)),
    "DistilBertModel": (
        {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        keywords(**READ),
    ),
    "ElectraModel": ({**TEXT, "embedding_size": 8}, keywords(**READ)),
    "GPT2LMHeadModel": (
        {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL},
        keywords(**LABELLED),
    ),
    "GPTNeoXForCausalLM": (TEXT, keywords(**LABELLED)),
    "LlamaForCausalLM": (DECODER, keywords(**LABELLED)),
    "MambaForCausalLM": (
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        keywords(input_ids=tokens(2, 7), labels=tokens(2, 7, seed=1)),
    ),
    "MistralForCausalLM": ({**DECODER, "sliding_window": 4}, keywords(**LABELLED)),
    "MixtralForCausalLM": ({**DECODER, "num_local_experts": 3, "num_experts_per_tok": 2}, keywords(**LABELLED)),
    "MobileNetV2ForImageClassification": ({"image_size": 32, "depth_multiplier": 0.35}, keywords(**PICTURE)),
    "PatchTSTForPrediction": (
        {"num_input_channels": 2, "context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
        | {"d_model": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16},
        keywords(past_values=floats(2, 16, 2), future_values=floats(2, 4, 2)),
    ),
    "Qwen2ForCausalLM": (DECODER, keywords(**LABELLED)),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        keywords(**PICTURE),
    ),
    "RobertaModel": ({**TEXT, "pad_token_id": 1}, keywords(**READ)),
    "SegformerForSemanticSegmentation": (
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 16, 16],
            "num_attention_heads": [1, 1, 2, 2],
            "decoder_hidden_size": 16,
        },
        keywords(pixel_values=floats(2, 3, 64, 64)),
    ),
    "SwinForImageClassification": (
        {**STAGES, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2, "patch_size": 2},
        keywords(**PICTURE),
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"decoder_start_token_id": 0},
        keywords(**LABELLED),
    ),
    "UperNetForSemanticSegmentation": (
        {"hidden_size": 16, "auxiliary_in_channels": 16, "pool_scales": [1, 2]},
        keywords(pixel_values=floats(2, 3, 64, 64)),
    ),
    "ViTForImageClassification": ({**SEEN, "patch_size": 8}, keywords(**PICTURE)),
    "Wav2Vec2Model": (SPEECH, keywords(input_values=floats(2, 400))),
    "WhisperForConditionalGeneration": (
        ENCODER_DECODER
        | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16, "decoder_start_token_id": 1}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        keywords(input_features=floats(2, 8, 20), labels=tokens(2, 5)),
    ),
}


def entries() -> Zoo:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return {name: Entry(partial(_make, transformers, name), call) for name, (_, call) in MODELS.items()}


def _make(transformers: Any, name: str) -> nn.Module:
    model = getattr(transformers, name)
    options = dict(MODELS[name][0])
    if name == "UperNetForSemanticSegmentation":
        stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
        names = ["stage1", "stage2", "stage3", "stage4"]
        options["backbone_config"] = transformers.ResNetConfig(**stages, out_features=names)
    network: nn.Module = model(model.config_class(**options))
    return network
