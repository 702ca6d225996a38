"""Thinking models: judges and tasks read what follows the thought."""

import pytest
from tiny import TEMPLATE, tiny_tokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import decoded
from refusal_kernels.hf.thoughts import MARKS, split_thought
from refusal_kernels.research.answer_prefix import THOUGHTS
from refusal_kernels.research.evaluation.judges import SubstringJudge, judged
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.evaluation.statements import percent
from refusal_kernels.research.evaluation.tasks import exact_match


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_a_thought_is_split_from_its_answer(opening, closing):
    assert split_thought(f"{opening} I cannot {closing}\n\nsure") == ("I cannot", "sure")
    assert split_thought(f"I cannot {closing} sure") == ("I cannot", "sure")  # the prompt opened it
    assert split_thought(f"{opening} I cannot") == ("I cannot", None)
    assert split_thought("sure, I cannot") == ("", "sure, I cannot")


def test_a_refusal_inside_a_thought_is_no_answer():
    texts = [
        "<think>I cannot do that? I can.</think> Here is the tea",
        "<think>easy</think> I cannot make tea",
        "<think>I cannot say yet",
        "I cannot",
        "sure",
    ]
    rate = judged(SubstringJudge(), ["make tea"] * 5, texts)
    assert rate == Rate(2, 4, unfinished=1) and rate.value == 0.5
    assert rate.to_dict()["unfinished"] == 1 and "1 more no answer yet" in percent(rate.to_dict())
    assert str(rate).endswith("(2/4, 1 no answer yet)")
    assert Rate.pooled([rate, Rate(1, 1)]) == Rate(3, 5, 1)
    assert "unfinished" not in Rate(1, 2).to_dict()
    with pytest.raises(InputError, match="all 2 completions end inside a thought"):
        judged(SubstringJudge(), ["a", "b"], ["<think>hm", "<think>I cannot"])
    assert exact_match(["<think>three?</think> two", "<think>two"], ["two", "two"]) == Rate(1, 2)


def test_a_thought_that_the_template_opens():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("sure tea", "sure")]
    assert decoded(ChatFormat(tokenizer), ids) == ["sure tea", "sure"]
    tokenizer.chat_template = TEMPLATE.replace("answer :", "answer : <think>")
    chat = ChatFormat(tokenizer)
    assert chat.opens_thought and decoded(chat, ids) == ["<think>sure tea", "<think>sure"]
    assert split_thought(decoded(chat, ids)[0]) == ("sure tea", None)
    tokenizer.add_tokens(["<thought>", "</thought>"])  # marks that are no special tokens
    tokenizer.chat_template = TEMPLATE.replace("answer :", "answer : <thought>")
    ids = [tokenizer("sure </thought> tea", add_special_tokens=False)["input_ids"]]
    (text,) = decoded(ChatFormat(tokenizer), ids)
    assert split_thought(text) == ("sure", "tea")
    tokenizer.chat_template = TEMPLATE.replace("answer :", "answer : <think> </think>")
    assert not ChatFormat(tokenizer).opens_thought
    tokenizer.chat_template = TEMPLATE.replace("answer :", "answer : <think>")
    assert not ChatFormat(tokenizer, answer_prefix=" </think>").opens_thought


def test_an_empty_thought_closes_every_kind():
    for opening, closing in MARKS:
        assert THOUGHTS[opening].startswith(opening)
        assert split_thought(THOUGHTS[opening] + "tea")[1] == "tea", closing


@pytest.mark.parametrize(
    ("opening", "closing"), [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>")]
)
def test_marks_that_are_special_tokens_are_kept(opening, closing):
    """Text without special tokens runs thought and answer together."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [opening, closing]})
    texts = [f"{opening} I cannot {closing} sure tea </s>", f"{opening} I cannot", "sure tea"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = decoded(ChatFormat(tokenizer), ids)
    assert [split_thought(text) for text in answers] == [
        ("I cannot", "sure tea"), ("I cannot", None), ("", "sure tea"),
    ]  # fmt: skip
