"""What a model cannot take, and what is no answer, is refused by name."""

import pytest
import tiny_families
import torch
from tiny import run_command, tiny_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import refusal_kernels as rk
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import check_tokens
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.research.evaluation.likelihood import Passage, cross_entropy

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please"]
HARMLESS = ["make tea", "what is one plus two"]


def gpt2(positions):
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer()), n_positions=positions, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


CASES = {
    "a token without an embedding": (
        lambda: tiny_model(vocab_size=30),
        r"the tokenizer gives the token \d+; LlamaForCausalLM has 30 embeddings",
    ),
    "a prompt beyond learned positions": (
        lambda: gpt2(8),
        "a prompt has 9 tokens in its chat format.* GPT2LMHeadModel has 8 positions",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_can_not_take(case, tmp_path, capfd):
    build, words = CASES[case]
    model, tokenizer = build(), tiny_tokenizer()
    direction = rk.Direction(torch.randn(64), layer=1)
    candidates = rk.Candidates(torch.randn(4, model.config.num_hidden_layers, 64))
    asked, tokens = ["tell me how"], {"refusal_tokens": [7]}
    passages = [Passage(ids) for ids in ChatFormat(tokenizer).encode(asked)]
    sets = {"harmful": asked, "harmless": asked}
    for run in (
        lambda: rk.generate(model, tokenizer, asked, 4),
        lambda: last_logits(model, tokenizer, asked),
        lambda: cross_entropy(model, passages),
        lambda: rk.select(model, tokenizer, candidates, asked, asked, **tokens),
        lambda: rk.evaluate(model, tokenizer, direction, **sets, **tokens),
    ):
        with pytest.raises(InputError, match=words):
            run()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert run_command("generate", "tell me how", "--model", tmp_path, "--device", "cpu") == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("error: ")


def test_positions_are_counted_with_the_answer():
    model, tokenizer = gpt2(12), tiny_tokenizer()
    assert len(rk.generate(model, tokenizer, ["tell me how"], 3)) == 1
    with pytest.raises(InputError, match="9 tokens in its chat format and 4 to come"):
        rk.generate(model, tokenizer, ["tell me how"], 4)
    check_tokens(tiny_model(max_position_embeddings=8), 3, 9, 4)  # rotary positions go on
    check_tokens(tiny_families.build("mamba"), 3, 10_000)


def test_a_pad_token_without_an_embedding_is_not_used():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    expected = rk.generate(model, tokenizer, HARMFUL, 5)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    assert rk.generate(model, tokenizer, HARMFUL, 5) == expected


def evaluate(model, **more):
    more = {"random_controls": 0, "strengths": (), "refusal_tokens": [7], **more}
    direction = rk.Direction(torch.ones(64), layer=1)
    return rk.evaluate(
        model, tiny_tokenizer(), direction, harmful=HARMFUL, harmless=HARMLESS, max_new_tokens=3,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(value):
    model = tiny_model()
    model.lm_head.weight.data[9] = value
    words = "logits are NaN or infinite at prompt 1; expected numbers"
    for tokens in ([7], None):
        with pytest.raises(InputError, match=words):
            evaluate(model, refusal_tokens=tokens)
    with pytest.raises(InputError, match=words):
        rk.generate(model, tiny_tokenizer(), HARMFUL)


def test_the_edit_that_breaks_the_numbers_is_named():
    model = tiny_model(dtype=torch.float16)
    found = evaluate(model, strengths=(0.0, 1e38))
    note = "strength 1e+38 destroys the model: Ablate at strength 1e+38: the model's logits are NaN"
    assert any(line.startswith(note) for line in found.notes)
    assert [point.strength for point in found.dose["ablation"]] == [0.0]

    def broken(_, args, out):  # where all edits are measured in one batch
        return out * torch.nan if len(args[0]) > 2 else None

    model = tiny_model()
    model.model.layers[1].mlp.register_forward_hook(broken)
    with pytest.raises(InputError, match=r"^(ablated|added|subtracted): the model's logits"):
        evaluate(model)


def test_tokens_that_are_masked_are_no_fault():
    model = tiny_model()
    model.lm_head.register_forward_hook(
        lambda _, __, out: out.index_fill(-1, torch.tensor([9]), -torch.inf)
    )
    assert len(rk.generate(model, tiny_tokenizer(), HARMFUL, 4)) == 2
