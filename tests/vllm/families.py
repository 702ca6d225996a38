"""Tiny random models of every family, saved where vLLM can load them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from refusal_kernels import toy

HIDDEN, VOCABULARY = 64, 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    **{"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 4, "n_head": 2, "n_positions": 512},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64}
NEOX = {"rotary_pct": 0.25}
# family: (configuration class, what it takes beside COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mixtral": ("MixtralConfig", {**EXPERTS, "sliding_window": None}),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {**GEMMA, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "gpt2": ("GPT2Config", GPT2),
    "olmo2": ("Olmo2Config", {}),
    "neox": ("GPTNeoXConfig", NEOX),
}


def make(family: str, folder: Path, **changes: Any) -> str:
    """Save a seeded random float32 model of a family; return its folder."""
    name, special = FAMILIES[family]
    common = {} if family == "gpt2" else COMMON
    config = getattr(transformers, name)(**{**common, **special, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_((0.0 if "gemma" in family else 1.0) + 0.2 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5))
    path = folder / "-".join([family, *map(str, changes.values())])
    model.save_pretrained(path)
    return str(path)


def add_tokenizer(path: str) -> None:
    """Give a saved model the toy's tokenizer and chat template, with tokens enough."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy.PATH)
    tokenizer.add_tokens([f"<{k}>" for k in range(VOCABULARY - len(tokenizer))])
    tokenizer.save_pretrained(path)
