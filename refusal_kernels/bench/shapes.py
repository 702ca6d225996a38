"""The models that are measured: random weights at the shapes of real ones, the toy, any other."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.hf.loaded import REPORTED, check_loaded
from refusal_kernels.hf.model import text_config

TOKENS: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SHAPES: dict[str, Callable[[], Any]] = {
    "qwen2.5-0.5b": lambda: Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True, rms_norm_eps=1e-6,
        **TOKENS,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
        rms_norm_eps=1e-5, **TOKENS,
    ),
    "llama-3-8b": lambda: LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, rms_norm_eps=1e-5,
        max_position_embeddings=8192, **TOKENS,
    ),
    "qwen2.5-72b": lambda: Qwen2Config(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False, rms_norm_eps=1e-6,
        **TOKENS,
    ),
}  # fmt: skip


def config_of(name: str) -> Any:
    """Return the configuration of a shape, the toy, a folder or a hub id."""
    if name in SHAPES:
        return SHAPES[name]()
    try:
        return AutoConfig.from_pretrained(_path(name))
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise InputError(
            f"model '{name}': {first_line(error)}; shapes: {', '.join([*SHAPES, *EMBEDDED])}"
        ) from None


def _path(name: str) -> str:
    """Return the folder of a model that is known by name; the name of another."""
    return str(EMBEDDED[name].folder()) if name in EMBEDDED else name


def free_memory() -> float:
    """Return how many bytes of memory can be had; 8 GiB where nothing tells it."""
    with suppress(Exception):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return 8.0 * 2**30


def layer_weights(config: Any) -> int:
    """Return how many weights the matrices of one layer have."""
    text = config.get_text_config(decoder=True)
    hidden, heads = text.hidden_size, text.num_attention_heads
    width = getattr(text, "head_dim", None) or hidden // heads
    return int(
        hidden * (2 * width * (heads + text.num_key_value_heads) + 3 * text.intermediate_size)
    )


def layers_that_fit(config: Any, dtype: str, memory_bytes: float) -> int:
    """Return how many layers fit; 0 if not even one does.

    Half of the memory is for the weights, which all workers share; but one layer may take more, if
    with it in float64, as the reference has it, three quarters are not exceeded.
    """
    text = config.get_text_config(decoder=True)
    layer = layer_weights(config)
    embedding = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    size = getattr(torch, dtype).itemsize
    if size * (embedding + layer) + 8 * layer > 0.75 * memory_bytes:
        return 0
    fits = int((0.5 * memory_bytes - size * embedding) // (size * layer))
    return max(1, min(int(text.num_hidden_layers), fits))


def cut(config: Any, layers: int) -> Any:
    """Keep only so many layers."""
    text = config.get_text_config(decoder=True)
    if layers < text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def build(name: str, config: Any, dtype: str) -> Any:
    """Return a model on the CPU: random weights, the same every time, or the checkpoint's."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    if name in SHAPES:
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
        for parameter in model.parameters():  # as they are made, norms and biases do nothing
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        made: Any = AutoModelForCausalLM.from_pretrained(
            _path(name), config=config, dtype=kind, **REPORTED
        )
        model = check_loaded(name, *made)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def directions_of(model: Any, programs: int) -> Tensor:
    """Return unit vectors, float32 [programs, hidden], that the stream lies along.

    Leaving one in is seen in the logits.
    """
    count = 16 * programs
    ids = torch.arange(1, count + 1, device=model.device)[None] % text_config(model).vocab_size
    if count > getattr(text_config(model), "max_position_embeddings", count):
        raise InputError(f"{programs} programs; expected fewer for a model with few positions")
    streams = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    rows = streams[len(streams) // 2][0].float().view(programs, 16, -1).mean(1).cpu()
    return rows / rows.norm(dim=1, keepdim=True)
