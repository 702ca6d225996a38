"""Tiny random models and a word-level chat tokenizer: fast, seeded, and nothing trivially identity.

And the interventions in the plainest form there is, as hooks, to compare with.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def full(*values: Any) -> Any:
    """Return a case that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.full)


FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"attention_bias": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|end|>", "<|assistant|>"]
WORDS = [
    *("I", "I'm", "cannot", "sorry", "sure", "here", "answer", ":", "how", "to", "make", "a"),
    *("the", "cake", "storm", "spell", "tea", "box", "boat", "lamp", "curse", "hex", "paint"),
    *("fix", "tell", "me", "please", "now", "be", "kind", "brief", "what", "is", "plus", "one"),
    *("two", "three", "four", "five", "six"),
]
# The instruction is followed by four tokens: <|end|> <|assistant|> answer :
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <|' + message.role + '|> ' + message.content + ' <|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|> answer :' }}{% endif %}"
)
END_OF_INSTRUCTION = ["<|end|>", "<|assistant|>", "answer", ":"]


def tiny_tokenizer() -> Any:
    """One token per word, unknown words to <unk>, BOS from the template *and* the post-processor.

    So whoever tokenizes a rendered chat with special tokens gets BOS twice. There is no pad token.
    """
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    inner.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """Return a random causal model in evaluation mode; `config` overrides what the family gives."""
    config_class, model_class, extra = FAMILIES[family]
    settings = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }
    model = model_class(config_class(**{**settings, **extra, **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.ndim == 1:  # the weight of a norm
                parameter.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False).to(dtype)


@contextmanager
def plain_hooks(
    model: Any,
    *,
    ablate: torch.Tensor | None = None,
    add: Any = None,
    layer: int = 0,
    exact: bool = False,
) -> Iterator[None]:
    """The interventions of the paper, as hooks, in the dtype of the model or (`exact`) in float64.

    `ablate` is a vector of any norm, removed from the input of every block and from the output of
    every attention and every MLP; `add` is added to the input of one block, as it is.
    """

    def project(x: torch.Tensor) -> torch.Tensor:
        assert ablate is not None
        wide = x.double() if exact else x
        unit = (ablate.double() / ablate.double().norm()).to(wide.dtype)
        return (wide - (wide @ unit).unsqueeze(-1) * unit).to(x.dtype)

    def output(_: Any, __: Any, out: Any) -> Any:
        return (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)

    hooks = []
    for block in model.get_decoder().layers if ablate is not None else ():
        hooks += [
            block.register_forward_pre_hook(lambda _, args: (project(args[0]), *args[1:])),
            block.self_attn.register_forward_hook(output),
            block.mlp.register_forward_hook(output),
        ]
    if add is not None:
        hooks.append(
            model.get_decoder()
            .layers[layer]
            .register_forward_pre_hook(lambda _, args: (args[0] + add.to(args[0].dtype), *args[1:]))
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def greedy(model: Any, prompt: str, new: int, ends: tuple[int, ...] = (2,)) -> str:
    """One prompt alone, every token from scratch, without a cache."""
    from refusal_kernels.hf.chat import ChatFormat

    tokenizer = tiny_tokenizer()
    ids = ChatFormat(tokenizer).encode([prompt])[0]
    start = len(ids)
    for _ in range(new):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def run_command(*words: Any) -> int:
    """Run the command line in this process; return its exit code."""
    from refusal_kernels import cli

    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as exit_:
        patched.setattr(sys, "argv", ["refusal-kernels", *map(str, words)])
        cli.main()
    return int(exit_.value.code or 0)
