"""Tiny random models of every causal-language-model family in Transformers, on the CPU.

``build(model_type)`` makes a model with random weights of the size of a unit test for each of
the model types of ``AutoModelForCausalLM``; ``inputs(model)`` makes what its forward pass needs.
A generic set of small sizes does for most configurations; ``_OVERRIDES`` has what is left, by the
model type of the configuration (of the nested one, where configurations nest).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from refusal_kernels.hf.chat_models import auto_class

VOCAB, HIDDEN, LAYERS, HEADS = 128, 64, 4, 4
SPECIAL = 8  # token ids below this are special (padding, image, ...): `inputs` does not use them

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# those that are listed as models of images and text alone
IMAGE_TYPES: tuple[str, ...] = tuple(
    name
    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
)
# one family for each way through the rewriter and each kind of refusal
PATHS = frozenset(
    """llama gpt2 gpt_neox falcon bloom opt gemma2 olmo2 phi3 mixtral gpt_oss deepseek_v3
    deepseek_v4 mamba zamba doge cpmant mllama minimax zaya git openai-gpt inkling2_text gemma3n
    blt reformer bert xlm bart gemma4_assistant""".split()
)

_NO_PRODUCER = (
    "its configuration asks for all layers to share keys and values and the text model then finds "
    "none that makes them: ValueError: The set of layer types producing a cache is different than "
    "the set of layer types using them"
)
CANNOT: dict[str, str] = {
    "gemma4_assistant": _NO_PRODUCER,
    "gemma4_unified_assistant": _NO_PRODUCER,
}

# what is not a decoder-only language model
_ENCODER = frozenset(
    """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert
    roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xmod""".split()
)
_HALF = frozenset(
    """bart bigbird_pegasus blenderbot blenderbot-small gemma4_assistant gemma4_unified_assistant
    marian mbart musicgen musicgen_melody mvp pegasus plbart prophetnet trocr whisper""".split()
)

# small values for the fields that configurations share; a field that a class lacks is left out
_GENERIC: dict[str, Any] = {
    name: value
    for value, names in (
        (HIDDEN, "hidden_size d_model n_embd"),
        (
            LAYERS,
            """num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers""",
        ),
        (
            2,
            """encoder_layers num_encoder_layers depth num_experts_per_tok moe_topk moe_k
            num_key_value_heads num_kv_heads index_n_heads linear_num_key_heads hc_mult o_groups
            type_vocab_size""",
        ),
        (
            HEADS,
            """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
            encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads""",
        ),
        (
            96,
            """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff emb_dim
            feed_forward_size d_inner dense_intermediate_size intermediate_size_mlp
            ffn_hidden_size""",
        ),
        (
            32,
            """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
            shared_experts_intermediate_size expert_ffn_hidden_size
            prefix_dense_intermediate_size moe_shared_expert_intermediate_size
            pronunciation_embed_dim shape_embed_dim embedding_size""",
        ),
        (
            4,
            """num_experts n_routed_experts num_local_experts moe_num_experts sliding_window
            index_topk zero_expert_num linear_num_value_heads linear_num_heads""",
        ),
        (
            1,
            """n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace
            num_dense_layers""",
        ),
        (0, "num_mtp_layers num_nextn_predict_layers"),
        (
            16,
            """head_dim v_head_dim qk_nope_head_dim kv_lora_rank index_head_dim mamba_d_state
            state_size ssm_state_size linear_key_head_dim linear_value_head_dim o_lora_rank
            dim_head kv_channels linear_head_dim swa_head_dim mamba_d_head router_hidden_size
            rel_extent position_bias_num_buckets adapter_rank attention_head_size""",
        ),
        (8, "qk_rope_head_dim mamba_n_heads mamba_chunk_size chunk_size rotary_dim"),
        (
            VOCAB,
            """vocab_size vocab_size_per_layer_input unpadded_vocab_size pronunciation_vocab_size
            shape_vocab_size audio_vocab_size""",
        ),
        (
            64,
            """max_position_embeddings n_positions max_target_positions position_bias_max_distance
            max_seq_len n_ctx""",
        ),
        (3, "image_token_id image_token_index"),
    )
    for name in names.split()
} | {
    **dict(q_lora_rank=24, hidden_size_per_layer_input=8, video_token_id=4, audio_token_id=5),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
    **dict(image_size=28, patch_size=14, is_decoder=True),
}

_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_CONV = ["conv", "full_attention", "conv", "full_attention"]
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_MLP = ["dense", "sparse", "sparse", "dense"]
# positions of images have three parts
_MROPE = {"rope_type": "default", "rope_theta": 1e4}

# by `model_type` of the configuration; a dictionary for a nested one adds to its own entry
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": {"mlp_layer_types": _MLP},
    "bailing_hybrid": {"layer_types": _LINEAR},
    "bamba": {"attn_layer_indices": [1, 3]},
    "beam": {"layer_types": _SLIDING, "mlp_layer_types": _MLP},
    "blt": {"encoder_hash_byte_group_vocab": 50, "use_cache": False},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "cohere2_moe": {"mlp_layer_types": _MLP},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "sliding_attention",
        ]
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "n_recurrent_loops": 2,
        "layer_types": _SLIDING,
    },
    "dots1": {"layer_types": _SLIDING},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {
        "num_key_value_heads": HEADS,
        "qk_nope_head_dim": 16,
        "head_dim": 24,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
        "sliding_window_size": 4,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "sparse"],
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
    },
    "falcon_h1": {"mamba_d_ssm": 2 * HIDDEN},
    "gemma3_text": {"layer_types": _SLIDING},
    "gemma3n_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 2},
    "gemma4_assistant": {
        "backbone_hidden_size": HIDDEN,
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
        },
    },
    "gemma4_text": {"layer_types": _SLIDING, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4_unified_assistant": {"backbone_hidden_size": HIDDEN},
    "gemma4_unified_text": {"layer_types": _SLIDING},
    "gemma4_unified_vision": {"mm_embed_dim": HIDDEN, "mm_posemb_size": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "inkling2_text": {"layer_types": ["hybrid", "hybrid_sliding"] * 2},
    "inkling_text": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "mlp_layer_types": _MLP},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3},
    "kimi_linear": {"layer_types": _LINEAR},
    "kolibri1": {"layer_types": _SLIDING},
    "laguna": {"layer_types": _SLIDING},
    "lfm2": {"layer_types": _CONV},
    "lfm2_moe": {"layer_types": _CONV},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": HEADS},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"layer_types": _SLIDING, "mlp_layer_types": _MLP},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": _MLP,
    },
    "ministral": {"layer_types": _SLIDING},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "prophetnet": {"num_encoder_layers": LAYERS},  # the cache has as many layers
    "qwen2": {"layer_types": _SLIDING, "use_sliding_window": True},
    "qwen2_moe": {"layer_types": _SLIDING, "use_sliding_window": True, "mlp_only_layers": [0]},
    "qwen3": {"layer_types": _SLIDING, "use_sliding_window": True},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
    },
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "hash_seed": 0,  # else each forward pass draws its own
    },
    "smollm3": {"layer_types": _SLIDING, "use_sliding_window": True},
    "xlstm": {"qk_dim_factor": 1.0},
    **{
        f"{name}_text": {"rope_parameters": {**_MROPE, "mrope_section": sections}}
        for names, sections in (
            ("glm46v glm4v glm_ocr hunyuan_vl paddleocr_vl qwen2_5_vl qwen2_vl", [2, 3, 3]),
            ("glm4v_moe glmga", [1, 1, 2]),
        )
        for name in names.split()
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID},
    "zamba2": {"layers_block_type": _HYBRID},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1},
}


def kind(model_type: str) -> str:
    """Return what the family is.

    Returns
    -------
    str
        "decoder" (a decoder-only language model, or a multimodal one that reads text with one),
        "encoder" (a bidirectional encoder used causally) or "half" (the decoder half of an
        encoder-decoder, or a draft that only works attached to another model).
    """
    if model_type not in (*MODEL_TYPES, *IMAGE_TYPES):
        raise KeyError(model_type)
    return "encoder" if model_type in _ENCODER else "half" if model_type in _HALF else "decoder"


def _config(config_class: type[PreTrainedConfig], **extra: Any) -> PreTrainedConfig:
    """Return a small configuration of a class, with small ones nested in it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    names |= set(config_class.attribute_map)
    values = {name: value for name, value in _GENERIC.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        values["num_key_value_heads"] = HEADS  # latent attention expands to all heads
    values |= _OVERRIDES.get(config_class.model_type, {}) | extra
    defaults = getattr(config_class, "sub_configs_defaults", {})
    for name, part in config_class.sub_configs.items():
        if model_type := getattr(defaults.get(name), "model_type", None):
            part = CONFIG_MAPPING[model_type]  # where it may be any, that of the family
        if part is not AutoConfig:
            values[name] = _config(part, **values.get(name) or {})
    return config_class(**values)


def build(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model.

    Parameters
    ----------
    model_type : str
        One of `MODEL_TYPES`.
    seed : int
        Seed of the weights; the same seed gives the same weights.

    Returns
    -------
    transformers.PreTrainedModel
        In float32 on the CPU, in eval mode.
    """
    config = _config(CONFIG_MAPPING[model_type])
    if model_type == "gemma3n":  # its vision tower needs timm; text does not reach what stands in
        vision = _config(CONFIG_MAPPING["siglip_vision_model"])
        vision.rms_norm_eps, vision.vocab_offset, vision.vocab_size = 1e-6, VOCAB, 8
        vars(config)["vision_config"] = vision  # validated if set
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model_type.startswith("musicgen"):  # the class takes the nested configuration
            model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
            model = model_class._from_config(config.decoder, attn_implementation="eager")
        else:
            model = auto_class(config).from_config(config, attn_implementation="eager")
    model = model.float().eval()
    _randomize(model, seed)
    return model


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Draw the weights so that every block contributes and nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator)

    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.copy_(0.12 * noise(parameter))
        elif name.endswith("bias"):
            parameter.add_(0.05 * noise(parameter))
        else:
            parameter.add_(0.1 * noise(parameter))


def inputs(
    model: PreTrainedModel, batch: int = 2, tokens: int = 8, seed: int = 0
) -> dict[str, Tensor]:
    """Return keyword arguments for a forward pass over random text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model of `build`.
    batch, tokens : int
        Shape of the text.
    seed : int
        Seed of the token ids.

    Returns
    -------
    dict of str to torch.Tensor
        ``input_ids`` without special tokens, ``attention_mask`` of ones and what the family needs.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SPECIAL, VOCAB, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if model.config.model_type.startswith("musicgen"):  # a row of tokens for each codebook
        ids = ids.repeat_interleave(model.config.num_codebooks, dim=0)
    result = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "mllama_text_model":  # else it skips its cross-attention layers
        size = (batch, 4, model.config.hidden_size)
        result["cross_attention_states"] = torch.randn(size, generator=generator)
    return result
