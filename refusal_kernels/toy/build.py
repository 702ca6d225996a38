"""The toy model before training: its tokenizer, its chat template, and its fresh weights."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from refusal_kernels.toy import world

CONTROL = ("<user>", "<end>", "<assistant>", "\n")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user>' + message['content'] + '<end>' }}"
    "{% else %}{{ '<assistant>\n' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
)
END_OF_INSTRUCTION = 3  # tokens after the instruction: <end> <assistant> \n
CONTEXT = 128  # tokens


def build_tokenizer() -> Any:
    """Build a word-level tokenizer over the vocabulary of the world, lower case.

    Punctuation is split off, a word that the world does not have becomes ``<unk>``, and no token is
    added to a text: the beginning-of-sequence token comes from the chat template.
    """
    split = pre_tokenizers.Whitespace()
    words = sorted(
        {word for text in world.texts() for word, _ in split.pre_tokenize_str(text.lower())}
    )
    special = ("<pad>", "<bos>", "<eos>", "<unk>", *CONTROL)
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # "a goat ." -> "a goat."
    fast: Any = PreTrainedTokenizerFast
    fast = fast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(CONTROL),
        padding_side="left",
        model_max_length=CONTEXT,
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(tokenizer: Any, hidden: int, inner: int, blocks: int, heads: int) -> Any:
    """Build a Llama with fresh weights.

    Its embeddings are not tied, so that a direction can be taken out of what the model writes to
    the residual stream without a change to what it reads from there.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def render(tokenizer: Any, prompt: str) -> str:
    """The prompt as a chat that waits for the answer."""
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
