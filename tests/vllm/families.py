"""Tiny random models of every family, saved where vLLM can load them, and what they should say."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers

import refusal_kernels as rk

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
    path = folder / family
    model.save_pretrained(path)
    return str(path)


def hugging_face(path: str) -> Any:
    """Load a saved model."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def greedy(
    model: Any, prompt: list[int], tokens: int, interventions: Any = (), strength: float = 1.0
) -> list[int]:
    """Continue a prompt greedily, patched: what vLLM must say."""
    patched = rk.patch(model, *interventions) if interventions else contextlib.nullcontext()
    with patched as handle, torch.inference_mode():
        if handle is not None and strength != 1.0:
            handle.strength = [strength * i.strength for i in interventions]
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def prompts(count: int = 4, seed: int = 3, longest: int = 30) -> list[list[int]]:
    """Make prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def served(llm: Any, asked: list[tuple[list[int], Any]], tokens: int = 16) -> list[list[int]]:
    """Generate greedily, all requests at once; ``asked`` has (prompt, steer) pairs."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if steer is None else {"steer": steer},
        )
        for _, steer in asked
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
