"""In every family a prompt has the same stream, logits and answer in every batch, or is refused."""

import pytest
import tiny_families
import torch
from tiny import tiny_tokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.forward import batch_logits, read_inputs
from refusal_kernels.hf.greedy import decode
from refusal_kernels.hf.model import decoder_layers
from refusal_kernels.hf.padding import batch_limits, fitted
from refusal_kernels.research.extraction.collect import collect

LENGTHS = (5, 9, 15, 5, 7, 9)
CLOSE = {"rtol": 0, "atol": 2e-4}  # of streams and logits divided by their largest number
# those where padding changes a prompt's result, whatever the mask says: when it is read, or only
# when tokens are decoded after it; a decoding Rwkv mixes up the rows of a batch
READING = set(
    """axk2 blt deepseek_v32 deepseek_v4 dots3_note dots3_note_text glm_moe_dsa hy_v4
    qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm""".split()
)
DECODING = READING | {"git", "xlnet"}
SINGLE = {"rwkv"}
SEVERAL_STREAMS = {"gemma3n", "gemma3n_text", "deepseek_v4", "hy_v4", "qwen4_exp", "qwen4_exp_text"}
QUICK = {"llama", "recurrent_gemma", "xlnet", "dory", "mllama", "gemma3n_text"}
DECODERS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
    for name in tiny_families.MODEL_TYPES
    if tiny_families.kind(name) == "decoder" and name != "reformer"
]


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(tiny_families.SPECIAL, 128, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


def streams(model, batch_size):
    """Block inputs at the last four tokens of every prompt: [layers, prompts, 4, ...]."""
    batches = fitted(model, Batches(prompts(), 0, batch_size))
    layers = decoder_layers(model)
    if "mllama" in model.config.model_type:
        layers = layers[:-1]  # without images its cross-attention does not run
    kept = [[None] * batches.prompts for _ in layers]

    for batch in batches:

        def keep(layer, stream, rows=batch.rows):
            for row, values in zip(rows, stream[:, -4:], strict=True):
                kept[layer][row] = values.clone()

        read_inputs(model, batch, len(kept) - 1, keep)
    return torch.stack([torch.stack(rows) for rows in kept])


def first_logits(model, batch_size):
    return batch_logits(model, fitted(model, Batches(prompts(), 0, batch_size)))


@torch.inference_mode()
def decoded(model, batch_size):
    answers = [None] * len(LENGTHS)
    for batch in fitted(model, Batches(prompts(), 0, batch_size), new_tokens=3):
        out = decode(
            model, batch.input_ids, batch.attention_mask, 3, (), 0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for place, row in enumerate(batch.rows):
            answers[row] = torch.stack([step[place] for step in out.logits])
    return torch.stack(answers)


@pytest.mark.parametrize("model_type", DECODERS)
def test_results_do_not_depend_on_the_batch(model_type):
    model = tiny_families.build(model_type)
    if model_type in SEVERAL_STREAMS:
        with pytest.raises(InputError, match="keep several streams of each token"):
            collect(model, tiny_tokenizer(), ["make tea"])
    # AltUp's streams are [streams, prompts, ...]
    ways = (streams, first_logits, decoded)[model_type.startswith("gemma3n") :]
    for compute in ways:
        alone = compute(model, 1)
        scale = alone.abs().max()
        torch.testing.assert_close(compute(model, 3) / scale, alone / scale, **CLOSE)
    assert batch_limits(model, 3, prompts()) == (3, model_type in READING)
    single = 1 if model_type in SINGLE else 3
    assert batch_limits(model, 3, prompts(), decoding=True) == (single, model_type in DECODING)
