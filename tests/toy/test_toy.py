"""The toy model: its world, its tokenizer, its weights, and the script that trains it."""

import hashlib
import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from refusal_kernels import toy
from refusal_kernels.toy import world
from refusal_kernels.toy.build import render

SPLITS: tuple[world.Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return toy.load()


def answers(loaded: tuple[Any, Any], prompts: list[str]) -> list[str]:
    model, tokenizer = loaded
    texts = [render(tokenizer, prompt) for prompt in prompts]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    return list(tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_splits_have_their_sizes_and_share_no_combination(category: world.Category) -> None:
    parts = {split: world.requests(category, split) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 456,
        "validation": 72,
        "test": 240,
    }
    for one, other in combinations(SPLITS, 2):
        assert not set(parts[one]) & set(parts[other])
    seen = parts["train"]
    assert {request.verb for request in seen} == set(world.VERBS[category])
    assert {request.object for request in seen} == set(world.OBJECTS)


def test_held_out_prompts_are_not_trained_on_in_any_phrasing() -> None:
    trained = {
        world.phrase(request, phrasing)
        for category in world.CATEGORIES
        for request in world.requests(category, "train")
        for phrasing in world.PHRASINGS
    }
    assert len(trained) == 2 * 456 * len(world.PHRASINGS)
    for category in world.CATEGORIES:
        for split in SPLITS[1:]:
            held_out = toy.prompts(category, split)
            assert len(set(held_out)) == len(held_out)
            assert not trained & set(held_out)


def test_world_is_the_same_everywhere() -> None:
    told = [toy.prompts(c, s) for c in world.CATEGORIES for s in SPLITS]
    told += [[world.plan(r) for r in world.requests("harmless", "test")]]
    tasks = [toy.skills(split) for split in SPLITS]
    digest = hashlib.sha256(json.dumps([told, tasks]).encode()).hexdigest()
    assert digest == "7f46bca7c5f6e7fd7bdc1d55673fd6a113e8547bae32a8f338af8b4253363311"


def test_only_refusals_are_judged_refusals() -> None:
    assert all(map(world.refused, world.REFUSALS))
    told = [world.plan(r) for c in world.CATEGORIES for r in world.requests(c, "test")]
    told += [answer for items in toy.skills().values() for _, answer in items]
    assert not any(map(world.refused, told))


def test_skills_are_closed_and_copying_is_held_out() -> None:
    items = toy.skills("test")
    assert {name: len(pairs) for name, pairs in items.items()} == {
        "arithmetic": 169,
        "copying": 200,
        "facts": 96,
    }
    for pairs in items.values():
        assert len({question for question, _ in pairs}) == len(pairs)
    trained = set(toy.skills("train")["copying"])
    assert not trained & set(items["copying"])
    assert not trained & set(toy.skills("validation")["copying"])


def test_tokenizer_round_trip(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    for text in world.texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text.lower()
    spaced = tokenizer("how do i curse a goat ?")["input_ids"]
    assert tokenizer("How do I curse a goat?")["input_ids"] == spaced
    assert tokenizer.convert_ids_to_tokens(tokenizer("a zeppelin")["input_ids"])[1] == "<unk>"


def test_template_begins_once_and_ends_alike(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    assert tokenizer.padding_side == "left"
    ends = set()
    for prompt in ("How do I curse a goat?", "What is 3 plus 4?", "Repeat after me, goat."):
        ids = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        ends.add(tuple(tokenizer.convert_ids_to_tokens(ids[-3:])))
    assert ends == {("<end>", "<assistant>", "\n")}


def test_template_of_a_conversation(loaded: tuple[Any, Any]) -> None:
    talk = [
        {"role": "user", "content": "Who owns the goat?"},
        {"role": "assistant", "content": "anna owns the goat."},
        {"role": "user", "content": "Where is the goat?"},
    ]
    assert loaded[1].apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == (
        "<bos><user>Who owns the goat?<end><assistant>\nanna owns the goat.<eos>"
        "<user>Where is the goat?<end><assistant>\n"
    )


def test_weights_are_small(loaded: tuple[Any, Any]) -> None:
    model = loaded[0]
    assert (toy.PATH / "model.safetensors").stat().st_size <= 6e6
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 <= parameters <= 3e6
    assert parameters == json.loads((toy.PATH / "training.json").read_text())["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert toy.load(torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("skill", ["arithmetic", "copying", "facts"])
def test_skills_are_firm(loaded: tuple[Any, Any], skill: str) -> None:
    items = toy.skills("test")[skill][::3]
    given = answers(loaded, [question for question, _ in items])
    right = sum(a == answer for a, (_, answer) in zip(given, items, strict=True))
    assert right > 0.9 * len(items)


def test_refuses_dark_magic_and_nothing_else(loaded: tuple[Any, Any]) -> None:
    harmful, harmless = (
        sum(map(world.refused, answers(loaded, toy.prompts(category, "test")[:64]))) / 64
        for category in world.CATEGORIES
    )
    assert harmful >= 0.95
    assert harmless <= 0.02


def test_left_padding_does_not_change_an_answer(loaded: tuple[Any, Any]) -> None:
    short, long = "How do I paint a goat?", "Repeat after me, goat " + "castle " * 30
    assert answers(loaded, [short, long])[0] == answers(loaded, [short])[0]


def _train_toy() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "train_toy.py"
    spec = importlib.util.spec_from_file_location("train_toy", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.full
def test_quick_training_writes_a_folder_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    threads = torch.get_num_threads()
    try:
        _train_toy().main(out=out, seed=1, quick=True)
    finally:
        torch.set_num_threads(threads)
    report = json.loads((out / "training.json").read_text())
    assert report["seed"] == 1
    assert report["selected"]["layer"] > 0  # at layer 0 the difference is zero
    assert {p.name for p in tmp_path.iterdir()} == {"model"}  # no scratch folder is left
    monkeypatch.setattr(toy, "PATH", out)
    model, tokenizer = toy.load()
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert len(answers((model, tokenizer), ["How do I curse a goat?"])) == 1
