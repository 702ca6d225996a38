"""TransformerLens: hooks of its bridge at the input of every block, its attention and its MLP.

With transformers 5.24, which calls a cache otherwise, version 4.3.0 of it drops the cache without
a word and decodes wrongly: so its environment has 5.17.
"""

from contextlib import contextmanager

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

PLACES = ("blocks.{}.hook_in", "blocks.{}.attn.hook_out", "blocks.{}.mlp.hook_out")


def some_tokenizer():
    """It wants one, though it is given tokens."""
    special = {"eos_token": "a", "pad_token": "a"}
    inner = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@contextmanager
def steer(model, task):
    r = task.per_row(model.dtype)
    bridge = TransformerBridge.boot_transformers(
        task.folder, hf_model=model, tokenizer=some_tokenizer(), device=model.device,
        dtype=model.dtype,
    )  # fmt: skip

    def project(x, hook):
        return x - (x * r).sum(-1, keepdim=True) * r

    def call(input_ids, **fed):
        return bridge(input_ids, **fed)

    blocks = task.blocks(model.config.num_hidden_layers)
    places = [(place.format(n), project) for n in blocks for place in PLACES]
    with bridge.hooks(fwd_hooks=places):
        yield call
