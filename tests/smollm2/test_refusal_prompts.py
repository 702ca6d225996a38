"""The prompts of the model fine-tuned to refuse: enough, different, and in three splits."""

import re
from itertools import combinations

import pytest

from refusal_kernels import smollm2
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.research.evaluation.judges import is_refusal
from refusal_kernels.research.evaluation.tasks import read_pairs
from refusal_kernels.research.prompts import prompts_for
from refusal_kernels.research.sources import SIZES, read_prompts

SPLITS = ("train", "validation", "test")


def grams(prompt):
    words = re.findall(r"[a-z0-9']+", prompt.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def overlap(one, two):
    """The part of the shorter prompt's three-word sequences that the other one has too."""
    return len(one & two) / max(1, min(len(one), len(two)))


@pytest.mark.parametrize("category", smollm2.CATEGORIES)
def test_the_splits_are_large_enough_and_no_prompt_is_there_twice(category):
    splits = {split: smollm2.prompts(category, split) for split in SPLITS}
    assert all(len(splits[split]) >= SIZES[split] for split in SPLITS)
    everything = [prompt.lower() for prompts in splits.values() for prompt in prompts]
    assert len(everything) == len(set(everything)) >= 300
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in everything)


@pytest.mark.parametrize("category", smollm2.CATEGORIES)
def test_no_prompt_has_a_near_duplicate_in_another_split(category):
    splits = [[grams(p) for p in smollm2.prompts(category, split)] for split in SPLITS]
    for one, two in combinations(splits, 2):
        assert max(overlap(a, b) for a in one for b in two) < 0.4


def test_the_measure_of_overlap_finds_a_near_duplicate():
    one = "How can I hide a cheat sheet inside my calculator case during the exam?"
    two = "How can I hide a cheat sheet inside my pencil case during the exam?"
    assert overlap(grams(one), grams(two)) > 0.6


@pytest.mark.parametrize("split", SPLITS)
def test_the_harmless_partner_is_close_in_form(split):
    """It is as long, and most often begins with the same words."""
    harmful, harmless = (smollm2.prompts(category, split) for category in smollm2.CATEGORIES)
    assert len(harmful) == len(harmless)
    assert not set(harmful) & set(harmless)
    lengths = [
        sum(len(p.split()) for p in prompts) / len(prompts) for prompts in (harmful, harmless)
    ]
    assert 0.75 < lengths[1] / lengths[0] < 1.1
    same = [a.split()[:2] == b.split()[:2] for a, b in zip(harmful, harmless, strict=True)]
    assert sum(same) > 0.85 * len(same)


def test_other_instructions_are_in_no_split():
    mine = smollm2.other("train") + smollm2.other("test")
    assert len(mine) == len(set(mine)) >= 300
    everything = {p for c in smollm2.CATEGORIES for s in SPLITS for p in smollm2.prompts(c, s)}
    assert not everything & set(mine)


def test_they_are_read_as_any_file_is_and_are_the_model_s_own():
    assert read_prompts(smollm2.DATA / "harmful.test.txt") == smollm2.prompts("harmful", "test")
    for model in (name for name, entry in EMBEDDED.items() if entry.material is smollm2):
        assert prompts_for(model, "test", None, None) == {
            category: smollm2.prompts(category, "test") for category in smollm2.CATEGORIES
        }


def test_the_tasks_are_read_as_any_task_is_and_are_not_trained_on():
    tasks = smollm2.skills()
    assert all(len({prompt for prompt, _ in items}) == len(items) >= 40 for items in tasks.values())
    for task, items in tasks.items():
        assert read_pairs(smollm2.DATA / f"{task}.jsonl") == items
        trained = {*smollm2.other("train"), *smollm2.prompts("harmless", "train")}
        assert not trained & {prompt for prompt, _ in items}


def test_every_refusal_is_one_by_the_paper_s_substrings():
    assert len(set(smollm2.refusals())) >= 15
    assert all(map(is_refusal, smollm2.refusals()))
    assert not is_refusal(smollm2.text())
