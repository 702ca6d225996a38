"""Cross-entropy against plain loops, and exact answers."""

import json
import math

import pytest
import torch
from tiny import FAMILIES, plain_hooks, tiny_model, tiny_tokenizer
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.interventions import Ablate
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.evaluation import likelihood
from refusal_kernels.research.evaluation.likelihood import (
    Loss,
    Passage,
    answers,
    context_of,
    cross_entropy,
    read_passages,
    read_texts,
    windows,
)
from refusal_kernels.research.evaluation.tasks import contains, exact, read_pairs

TEXT = "please tell me how to make a storm now and fix the lamp be kind what is one plus two"
PASSAGES = [
    Passage([1, 8, 9, 10, 22, 13], 1),
    Passage([1, 30, 12], 2),
    Passage([7, 8, 11, 12, 13, 14, 15, 16, 17], 4),
]


def plain(model, passages) -> tuple[float, int]:
    """One passage alone, all logits at once, in float64."""
    total, count = 0.0, 0
    for p in passages:
        with torch.no_grad():
            logits = model(torch.tensor([list(p.ids)])).logits[0].double().log_softmax(-1)
        for place in range(p.start, len(p.ids)):
            total -= float(logits[place - 1, p.ids[place]])
            count += 1
    return total / count, count


def other_families():
    common = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    # their logits are capped or scaled after the head
    yield Gemma2ForCausalLM(Gemma2Config(**common, final_logit_softcapping=1.5)).eval()
    yield CohereForCausalLM(CohereConfig(**common, logit_scale=7.0)).eval()


@pytest.mark.parametrize("at_once", [2**25, 3 * 48])
def test_cross_entropy_is_that_of_a_plain_loop(at_once, monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    for model in (*(tiny_model(family) for family in FAMILIES), *other_families()):
        nats, tokens = plain(model, PASSAGES)
        for batch_size in (1, 2, 8):
            calls: list[tuple[int, int]] = []
            progress = lambda *c, calls=calls: calls.append(c)  # noqa: E731
            loss = cross_entropy(model, PASSAGES, batch_size=batch_size, progress=progress)
            assert loss.tokens == tokens == 5 + 1 + 5
            assert loss.nats == pytest.approx(nats, rel=2e-5)
            assert calls[-1] == (3, 3)
        assert "forward" not in model.get_decoder().__dict__


def test_no_more_logits_at_once_than_said(monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 4 * 46)
    model, seen = tiny_model(), []
    cross_entropy(model, PASSAGES, batch_size=3)  # which finds out whether padding matters
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.numel()))
    cross_entropy(model, PASSAGES * 4, batch_size=12)
    assert len(seen) > 10 and max(seen[1:]) <= 4 * model.config.vocab_size


def test_under_a_patch_and_in_bfloat16() -> None:
    direction = Direction(torch.randn(64))
    model = tiny_model()
    with plain_hooks(model, ablate=direction.vector):
        nats, _ = plain(model, PASSAGES)
    with patch(model, Ablate(direction)):
        steered = cross_entropy(model, PASSAGES).nats
    assert steered == pytest.approx(nats, rel=1e-5)
    assert abs(steered - cross_entropy(model, PASSAGES).nats) > 1e-3
    half = tiny_model(dtype=torch.bfloat16)
    assert cross_entropy(half, PASSAGES).nats == pytest.approx(plain(half, PASSAGES)[0], rel=2e-2)


def test_windows_score_every_token_once() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    for context, stride in ((5, None), (5, 2), (6, 1), (100, None)):
        scored = []
        for p in windows(tokenizer, [TEXT, ""], context, stride):
            assert len(p.ids) <= context and p.ids[0] == bos and p.start >= 1
            scored += p.ids[p.start :]
        assert scored == ids  # the first too: BOS stands before it
    strided = windows(tokenizer, [TEXT], 6, 2)
    assert all(len(p.ids) - p.start == 2 and len(p.ids) == 6 for p in strided[1:-1])

    tokenizer._tokenizer.post_processor = None  # as of models without BOS
    for context, stride in ((5, None), (5, 2)):
        scored = []
        for p in windows(tokenizer, [TEXT], context, stride):
            assert len(p.ids) <= context
            scored += p.ids[p.start :]
        assert scored == ids[1:]
    for context, stride in ((1, None), (5, 5), (5, 0)):
        with pytest.raises(InputError, match="expected a context of 2 or more"):
            windows(tokenizer, [TEXT], context, stride)
    assert context_of(tiny_model()) == 256


def test_windows_of_the_whole_text_are_its_loss() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    loss = cross_entropy(model, windows(tokenizer, [TEXT], 64))
    assert loss.nats == pytest.approx(plain(model, [Passage(ids)])[0], rel=1e-5)


def test_answers_are_scored_after_their_prompts() -> None:
    tokenizer = tiny_tokenizer()
    passages = answers(tokenizer, [("make tea", "sure here"), ("fix", [9, 10, 11]), ("fix", "")])
    prompts = ChatFormat(tokenizer).encode(["make tea", "fix"])
    assert [list(p.ids[: p.start]) for p in passages] == prompts
    answer = tokenizer("sure here", add_special_tokens=False)["input_ids"]
    assert [list(p.ids[p.start :]) for p in passages] == [answer, [9, 10, 11]]
    assert answers(tokenizer, []) == []


def test_losses() -> None:
    assert Loss(math.log(8), 3).perplexity == pytest.approx(8)
    assert Loss(1e4, 3).to_dict() == {"nats": 1e4, "tokens": 3, "perplexity": None}
    json.dumps(Loss(1e4, 3).to_dict(), allow_nan=False)
    model = tiny_model()
    for passages, words in (
        ([], "no text to score"),
        ([Passage([1, 2], 0)], "scored from 0"),
        ([Passage([1], 1)], "scored from 1"),
    ):
        with pytest.raises(InputError, match=words):
            cross_entropy(model, passages)
    with pytest.raises(InputError, match="batch size is 0"):
        cross_entropy(model, PASSAGES, batch_size=0)
    model.lm_head.weight.fill_(math.inf)
    with pytest.raises(InputError, match="not finite"):
        cross_entropy(model, PASSAGES)
    assert "forward" not in model.get_decoder().__dict__


def test_right_answers() -> None:
    assert exact(" it  is 4.\n", "it is 4.") and not exact("it is 4", "it is 4.")
    assert contains("So, IT\nis 4.", "it is 4") and not contains("it is 42", "is 4")
    assert contains("the answer: (B)", "(B)") and not contains("", "4")


def test_files_of_texts_and_pairs(tmp_path) -> None:
    tokenizer = tiny_tokenizer()
    text = tmp_path / "book.txt"
    text.write_text("make tea\nfix the lamp\n")
    assert read_texts(text) == ["make tea\nfix the lamp"]
    assert len(read_passages(text, tokenizer, 64)) == 1
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "make tea"}\n\n"fix the lamp"\n')
    assert read_texts(lines) == ["make tea", "fix the lamp"]
    assert len(read_passages(lines, tokenizer, 64)) == 2
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"instruction": "make tea", "output": "sure"}\n')
    assert read_pairs(pairs) == [("make tea", "sure")]
    (passage,) = read_passages(pairs, tokenizer, 64)
    assert list(passage.ids[passage.start :]) == tokenizer.convert_tokens_to_ids(["sure"])
    for name, content, read, words in (
        ("a.jsonl", "{", read_texts, "a.jsonl:1 is not JSON"),
        ("b.jsonl", "[1]", read_texts, "b.jsonl:1 holds no text"),
        ("c.txt", " \n", read_texts, "holds no text"),
        ("d.jsonl", '{"prompt": "x"}', read_pairs, "d.jsonl:1 holds no pair"),
        ("e.jsonl", "", read_pairs, "holds no pair"),
        ("f.jsonl", "nonsense", read_pairs, "f.jsonl:1 is not JSON"),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            read(path)
    with pytest.raises(InputError, match="is not there"):
        read_texts(tmp_path / "nowhere.txt")
