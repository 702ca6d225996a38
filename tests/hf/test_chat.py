"""Chat templates of others: dates, lists of parts, what they raise, and tokenizers without one."""

import contextlib
import datetime
from unittest import mock

import pytest
import torch
from tiny import END_OF_INSTRUCTION, TEMPLATE, run_command, tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.conversation import Conversation

PROMPTS = ["make tea", "tell me how to fix the box", "storm"]


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


DATED = "{{ strftime_now('%d %b %Y') }} the cake " + TEMPLATE


@pytest.mark.parametrize(
    "today",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}",
        "{{ strftime_now(format='%d %b %Y') }}",
        "{% set now = strftime_now %}{{ now('%d %b ' + '%Y') }}",
        "{% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ today() }}",
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}",
    ],
)
def test_a_template_that_writes_the_date_writes_the_same_every_day(today, monkeypatch):
    from transformers.utils import chat_template_utils

    texts = []
    for day in (3, 4):
        clock = mock.Mock(now=lambda day=day: datetime.datetime(2026, 11, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        chat = ChatFormat(with_template(f"{today} the cake {TEMPLATE}"))
        texts.append(chat.render("make tea"))
    assert texts[0] == texts[1] and texts[0].startswith("26 Jul 2024 the cake")
    chat = ChatFormat(with_template(DATED), date="2026-11-29")
    assert chat.render("make tea").startswith("29 Nov 2026 the cake")
    with pytest.raises(InputError, match="the date is 'today'; expected one such as '2024-07-26'"):
        ChatFormat(with_template(DATED), date="today")


def test_the_date_is_kept_with_what_was_found():
    chat = ChatFormat(with_template(DATED), date="2026-11-29")
    candidates = rk.mean_difference(tiny_model(), chat, PROMPTS, PROMPTS[1:])
    assert "29 Nov 2026" in candidates.template


def test_a_run_resumes_on_another_day(monkeypatch, tmp_path):
    from transformers.utils import chat_template_utils

    model, file, found = tiny_model(), tmp_path / "run.safetensors", []

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    for day, progress in ((3, stop), (4, None)):
        clock = mock.Mock(now=lambda day=day: datetime.datetime(2026, 11, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        chat = ChatFormat(with_template(DATED))
        with pytest.raises(KeyboardInterrupt) if progress else contextlib.nullcontext():
            found = rk.mean_difference(
                model, chat, PROMPTS, PROMPTS[1:], batch_size=1, checkpoint=file, progress=progress
            )
    whole = rk.mean_difference(model, chat, PROMPTS, PROMPTS[1:], batch_size=1)
    assert torch.equal(found.vectors, whole.vectors)


# as Qwen's and LLaVA's: parts alone are shown, a string is dropped, or raises
PARTS = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|> "
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %} <|end|>{% endfor %} <|assistant|> answer :"
)
RAISING = PARTS.replace("part.type ==", "part['type'] + '' ==")


@pytest.mark.parametrize("template", [PARTS, RAISING])
def test_a_template_of_parts_is_given_parts(template):
    plain, parts = ChatFormat(tiny_tokenizer()), ChatFormat(with_template(template))
    assert parts.encode(PROMPTS) == plain.encode(PROMPTS)
    assert parts.positions == plain.positions == len(END_OF_INSTRUCTION)
    turns = [{"role": r, "content": "make tea"} for r in ("user", "assistant", "user")]
    assert parts.render(Conversation(turns)).count("make tea") == 3
    assert "be kind" in ChatFormat(with_template(template), "be kind").render("storm")


BROKEN = {
    "{{ messages[0].content + 1 }}": "refuses the conversation: TypeError: can only concatenate",
    "{{ 1 // (messages | length - 1) }}": "refuses the conversation: ZeroDivisionError",
    "{{ messages[7].content.x }}": "refuses the conversation: .*has no element 7",
    "{{ raise_exception('no users here') }}": "refuses the conversation: no users here",
    "{% for %}": "refuses the conversation: ",
    "<|user|> hello": "leaves the instruction out",
}


@pytest.mark.parametrize("template", BROKEN)
def test_what_a_template_raises_is_one_line(template, tmp_path, capfd):
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    with_template(template).save_pretrained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    assert run_command("generate", "hi", "--model", tmp_path, "--device", "cpu") == 2
    out, err = capfd.readouterr()
    assert not out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: the chat template ")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(InputError, match=BROKEN[template]):
        ChatFormat(with_template(template))


class OwnIds(type(tiny_tokenizer())):
    """Makes tokens of a chat itself and knows no template, as mistral-common's tokenizer."""

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False, **kwargs):
        assert tokenize and add_generation_prompt and kwargs == {"return_dict": False}
        text = "<s>" + "".join(f" <|{m['role']}|> {m['content']} <|end|>" for m in messages)
        return self(text + " <|assistant|> answer :", add_special_tokens=False)["input_ids"]

    def get_chat_template(self, *_):
        raise NotImplementedError("there is none by design")


def test_a_tokenizer_without_a_template_gives_its_own_tokens():
    tokenizer = tiny_tokenizer()
    own = OwnIds(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")
    plain = ChatFormat(tokenizer)
    chat = ChatFormat(own)
    assert chat.encode(PROMPTS) == plain.encode(PROMPTS) and chat.positions == plain.positions
    assert torch.equal(chat.batch(PROMPTS)[0], plain.batch(PROMPTS)[0])
    model = tiny_model()
    assert rk.generate(model, chat, PROMPTS, 5) == rk.generate(model, plain, PROMPTS, 5)
    assert "make tea" in chat.render("make tea")
    prefixed = (
        ChatFormat(own, answer_prefix=" sure here"),
        ChatFormat(tokenizer, answer_prefix=" sure here"),
    )
    assert prefixed[0].encode(PROMPTS) == prefixed[1].encode(PROMPTS)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        ChatFormat(tokenizer)
