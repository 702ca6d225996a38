"""Prompt files, and the chat format: positions, BOS once, padding on the left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import END_OF_INSTRUCTION, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.conversation import Conversation
from refusal_kernels.research import answer_prefix
from refusal_kernels.research.sources import read_prompts, split_prompts

PROMPTS = ["make a cake", "tell me how to paint a boat now please", "curse", "zzz yyy"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n  two  \r\n \nthree", ["one", "two", "three"]),
        ("a.TXT", "\ufeffone\n", ["one"]),
        ("a.txt", "a\u2028b\n", ["a\u2028b"]),
        ("a.jsonl", '"one"\n\n{"prompt": "two"}\n{"instruction": "three"}\n{"text": "four"}\n',
         ["one", "two", "three", "four"]),
        ("a.jsonl", '{"text": "no", "prompt": "yes"}\n', ["yes"]),
        ("a.json", '["one", {"instruction": "two\\nlines", "category": 3}]', ["one", "two\nlines"]),
        ("a.json", '{"instruction": "one"}\n{"instruction": "two"}\n', ["one", "two"]),
        ("a.json", '[[{"role": "user", "content": "one"}]]', ["one"]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}]},'
         ' {"role": "assistant", "content": "no"}]}\n', ["one"]),
    ],
)  # fmt: skip
def test_prompts_are_read(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\n", "holds no prompt"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("a.md", b"one\n", r"expected one of \.txt"),
        ("a.csv", b"one\n", r"has no header with one of the columns prompt"),
        ("a.jsonl", b'"one"\n{"prompt": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'"one"\n\n{"answer": "two"}\n', r"a\.jsonl:3 holds no prompt"),
        ("a.jsonl", b'{"prompt": ""}\n', r"a\.jsonl:1 holds no prompt"),
        ("a.json", b"[]", "holds no prompt"),
        ("a.json", b'{"prompt": "one"}', "holds a dict; expected a list"),
        ("a.json", b'["one", 2]', "item 1 holds no prompt"),
        ("a.json", b"", "is not JSON"),
        ("a.json", b'{"prompt": "one"}\nmore', "is not JSON"),
        ("a.json", b"[[]]", "item 0 holds a list of messages without a turn of the user"),
        ("a.json", b'[[{"role": "user"}]]', "expected an object with role and content"),
        ("a.parquet", b"no", "is no Parquet file"),
    ],
)
def test_bad_prompt_files_are_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        read_prompts(tmp_path / "nowhere.txt")


def test_a_column_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "no", "Ask": "one"}\n')
    (tmp_path / "a.csv").write_text("prompt,ask\nno,two\n")
    assert read_prompts(f"{tmp_path}/a.jsonl+{tmp_path}/a.csv", "ask") == ["one", "two"]
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(InputError, match=r"column other; it has prompt, [Aa]sk"):
            read_prompts(tmp_path / name, "other")


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "two"}]
    table = pyarrow.table({"Goal": ["one", "more"], "chat": [turns, turns]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == ["one", "more"]
    assert read_prompts(tmp_path / "a.parquet", "chat") == ["two", "two"]
    with pytest.raises(InputError, match="the column other; it has Goal, chat"):
        read_prompts(tmp_path / "a.parquet", "other")


def test_prompts_of_several_turns_reach_the_template(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "make a cake"}, {"from": "gpt", "value": "sure"},
        {"from": "human", "value": "now a boat"}, {"from": "gpt", "value": "no"},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    (prompt,) = read_prompts(tmp_path / "a.json")
    assert prompt == "user: make a cake\n\nassistant: sure\n\nuser: now a boat"
    expected = (
        "<s> <|user|> make a cake <|end|> <|assistant|> sure <|end|> <|user|> now a boat <|end|>"
        " <|assistant|> answer :"
    )
    assert ChatFormat(tiny_tokenizer()).render(prompt) == expected
    with_system = ChatFormat(tiny_tokenizer(), "be kind").render(prompt)
    assert with_system == expected.replace("<s>", "<s> <|system|> be kind <|end|>")
    own = Conversation([{"role": "system", "content": "be brief"}, *prompt.messages])
    assert "kind" not in ChatFormat(tiny_tokenizer(), "be kind").render(own)
    assert split_prompts([prompt, "x"], {"all": None})["all"].count(prompt) == 1


def test_an_answer_prefix_ends_every_prompt() -> None:
    chat = ChatFormat(tiny_tokenizer(), answer_prefix=" I cannot")
    assert chat.positions == len(END_OF_INSTRUCTION) + 2
    assert chat.render("a").endswith("<|assistant|> answer : I cannot")


@pytest.mark.parametrize(
    ("answers", "thinking", "expected"),
    [
        (["sure here one", "sure here two", "sure here"], False, "sure here"),
        (["sure here one", "I cannot"], False, ""),
        (["<think> one", "<think> two"], False, "<think>\n\n</think>\n\n"),
        (["<think> one", "<think> two"], True, "<think>"),
        (["I cannot", "I cannot"], False, ""),  # a whole answer
    ],
)
def test_the_answer_prefix_is_found(monkeypatch, answers, thinking, expected) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
    if expected == "sure here":
        ids[2] = [*ids[2], 20]
    monkeypatch.setattr(answer_prefix, "generate_ids", lambda *_: ids)
    chat = ChatFormat(tokenizer, thinking=thinking)
    sets = {"harmful": ["a"], "harmless": ["b"]}
    assert answer_prefix.find_answer_prefix(None, chat, sets) == expected


@pytest.mark.parametrize("system", [None, "be kind"])
def test_positions_are_the_end_of_instruction_tokens(system: str | None) -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatFormat(tokenizer, system)
    assert chat.positions == len(END_OF_INSTRUCTION)
    for ids in chat.encode(PROMPTS):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens[-chat.positions :] == END_OF_INSTRUCTION
        assert tokens.count("<s>") == 1  # the tokenizer would add a second one
        assert ("kind" in tokens) == (system is not None)


def template(before: str, after: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = before + "{{ messages[-1].content }}" + after
    return tokenizer


def test_positions_of_other_templates() -> None:
    assert ChatFormat(template("<|user|> ", " :")).positions == 1
    # a suffix of unknown words, and one that holds words of the vocabulary
    assert ChatFormat(template("", " zzz make a")).positions == 3
    for after in ("", "zzz"):  # nothing follows, or only what merges with the instruction
        with pytest.raises(InputError, match="end-of-instruction"):
            ChatFormat(template("<|user|> ", after))
    silent = tiny_tokenizer()
    silent.chat_template = "<|user|> :"  # the instruction does not occur at all
    with pytest.raises(InputError, match="leaves the instruction out"):
        ChatFormat(silent)


def test_templates_that_do_not_serve_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        ChatFormat(tokenizer)
    strict = template("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}",
                      " :")  # fmt: skip
    assert ChatFormat(strict).positions == 1
    with pytest.raises(InputError, match="refuses the conversation"):
        ChatFormat(strict, system="be kind")
    with pytest.raises(InputError, match="leaves the system prompt out"):
        ChatFormat(template("", " :"), system="be kind")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_left_whatever_the_tokenizer_says(side: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    chat = ChatFormat(tokenizer)
    assert chat.pad_id == tokenizer.eos_token_id  # there is no pad token
    input_ids, mask = chat.batch(PROMPTS)
    assert input_ids.dtype == mask.dtype == torch.int64 and input_ids.shape == mask.shape
    for row, ids in enumerate(chat.encode(PROMPTS)):
        start = input_ids.shape[1] - len(ids)
        assert input_ids[row].tolist() == [chat.pad_id] * start + ids
        assert mask[row].tolist() == [0] * start + [1] * len(ids)
    tokenizer.pad_token = "<unk>"
    assert ChatFormat(tokenizer).pad_id == tokenizer.unk_token_id


def test_batches_hold_every_prompt_once_the_longest_first() -> None:
    chat = ChatFormat(tiny_tokenizer())
    batches = chat.batches(PROMPTS, 3)
    assert [row for batch in batches for row in batch.rows] == [1, 0, 3, 2]
    for batch in batches:
        ids, mask = chat.batch([PROMPTS[row] for row in batch.rows])
        assert torch.equal(batch.input_ids, ids) and torch.equal(batch.attention_mask, mask)


def test_bad_prompts_are_refused() -> None:
    chat = ChatFormat(tiny_tokenizer())
    for prompts in ([], "make a cake", [1], ["a", None]):
        with pytest.raises(InputError):
            chat.batch(prompts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="batch size is 0"):
        chat.batches(PROMPTS, 0)
    assert ChatFormat.of(chat) is chat


# Templates as the families have them, over one byte-level tokenizer that adds BOS by itself too.

SYSTEM = "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
INST = (
    SYSTEM + "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system else '')"
    " + m.content | trim + ' [/INST]' }}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}" + SYSTEM + "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
EMPTY_THOUGHT = (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
MARKS = [
    *("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>"),
    *("<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"),
    *("<|User|>", "<|Assistant|>"),
]
# template, what follows every instruction, in how many tokens (as the families' own tokenizers
# count, but for Llama-2), whether it takes a system prompt and thinks
FAMILIES = {
    "llama-3": (HEADERS, "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", 5, 1, 0),
    "llama-2": (INST, " [/INST]", 3, 1, 0),
    "mistral": ("{{ bos_token }}{% for m in messages %}{% if m.role != 'user' %}"
                "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content }} "
                "[/INST]{% endfor %}", " [/INST]", 3, 0, 0),
    "qwen": (CHATML + "{% endif %}", "<|im_end|>\n<|im_start|>assistant\n", 5, 1, 0),
    "gemma": (TURNS, "<end_of_turn>\n<start_of_turn>model\n", 5, 0, 0),
    "qwen3": (CHATML + EMPTY_THOUGHT,
              "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", 9, 1, 0),
    "qwen3 thinking": (CHATML + EMPTY_THOUGHT, "<|im_end|>\n<|im_start|>assistant\n", 5, 1, 1),
    "deepseek-r1": (THOUGHT, "<|Assistant|><think>\n", 3, 1, 0),
}  # fmt: skip
INSTRUCTIONS = [
    *("how to make a cake?", "1\n", "…", "a.", "say [/INST]", "x" * 300, "model"),
    *("user\n\nassistant", "<think>", "tell me\nhow", "  spaces  "),
]


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=MARKS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    words = ["assistant\n\n", "user\n", "model\n", "how to make a cake?", "say [/INST]"]
    inner.train_from_iterator(words * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", MARKS.index("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>",
        additional_special_tokens=MARKS[2:],
    )  # fmt: skip
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_in_the_families_templates(bytes_tokenizer: Any, family: str) -> None:
    template_, suffix, count, takes_system, thinking = FAMILIES[family]
    bytes_tokenizer.chat_template = template_
    chat = ChatFormat(bytes_tokenizer, thinking=bool(thinking))
    assert chat.positions == count
    for ids in chat.encode(INSTRUCTIONS):
        assert bytes_tokenizer.decode(ids[-count:]) == suffix
        assert ids.count(bytes_tokenizer.bos_token_id) == ("bos_token" in template_)
    assert len({ids[-count - 1] for ids in chat.encode(INSTRUCTIONS)}) > 1
    if not takes_system:
        with pytest.raises(InputError, match="refuses the conversation"):
            ChatFormat(bytes_tokenizer, "be kind")
        return
    kind = ChatFormat(bytes_tokenizer, "be kind", thinking=bool(thinking))
    assert kind.positions == count and "be kind" in kind.render("a")
    assert kind.encode(["a"])[0].count(bytes_tokenizer.bos_token_id) == ("bos_token" in template_)


def test_no_thoughts_are_asked_for_unless_they_are_wanted(bytes_tokenizer: Any) -> None:
    bytes_tokenizer.chat_template = CHATML + EMPTY_THOUGHT
    assert ChatFormat(bytes_tokenizer).render("a").endswith("<think>\n\n</think>\n\n")
    assert ChatFormat(bytes_tokenizer, thinking=True).render("a").endswith("assistant\n")
    # a format that was made with the option keeps it where a tokenizer is expected
    thinks = ChatFormat(bytes_tokenizer, thinking=True)
    assert ChatFormat.of(thinks) is thinks
