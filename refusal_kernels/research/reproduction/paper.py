"""The inputs of the paper's protocol: its prompts, its texts, its benchmarks.

Arditi et al. 2024 (arXiv 2406.11717), appendix A and the paper's code. A model that is known by
name has inputs of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.research.evaluation.likelihood import Passage, answers
from refusal_kernels.research.evaluation.tasks import Match
from refusal_kernels.research.prompts import prompts_for, split_sources
from refusal_kernels.research.selection.scoring import TokenSpec
from refusal_kernels.research.sources import (
    SEED,
    SIZES,
    Dataset,
    read_columns,
    read_prompts,
    split_prompts,
    split_sizes,
)

# the paper's sources; the paper's own files of splits are not used
HARMFUL = "advbench+malicious_instruct+tdc2023+harmbench"
HARMLESS = "alpaca"
HARMFUL_TEST = "jailbreakbench"
PILE = Dataset("monology/pile-uncopyrighted")
ALPACA = Dataset("tatsu-lab/alpaca", where={"input": ""})
PASSAGES, PASSAGE_TOKENS = 4096, 256  # of each text, as in the paper's code

# task, metric and number of shown examples, as on the Open LLM Leaderboard
BENCHMARKS: Mapping[str, tuple[str, str, int]] = {
    "mmlu": ("mmlu", "acc", 5),
    "arc": ("arc_challenge", "acc_norm", 25),
    "gsm8k": ("gsm8k", "exact_match (strict-match)", 5),
    "truthfulqa": ("truthfulqa_mc2", "acc", 0),
}
Prompts = dict[str, dict[str, list[str]]]
"""By split, "train", "validation" and "test", and category, "harmful" and "harmless"."""


@dataclass(frozen=True)
class Benchmarks:
    """The paper's four benchmarks in the lm-evaluation-harness."""

    manager: Any  # the result of `lm_eval.find_tasks`
    limit: float | None = None  # only so many examples of each task (below 1: this share)
    batch_size: int = 8
    seed: int = SEED  # of the shown examples

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, dict[str, Any]]:
        """Return the paper's metric of each benchmark, in the form of `run_tasks`."""
        from refusal_kernels.research.evaluation.lm_eval import run_tasks

        results = {}
        for name, (task, metric, shots) in BENCHMARKS.items():
            tasks = run_tasks(
                model, tokenizer, {name: None}, [task], manager=self.manager, limit=self.limit,
                num_fewshot=shots, batch_size=self.batch_size, seed=self.seed,
            )  # fmt: skip
            results[name] = {metric: tasks[name][task][metric]}
        return results


@dataclass
class ProtocolInputs:
    """The inputs of the protocol."""

    name: str  # the model's, in the report
    model: Any  # its weights are edited in the end
    tokenizer: Any  # or a `ChatFormat`
    prompts: Prompts
    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)  # for the cross-entropy
    skills: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    match: Match | None = None  # when an answer to a skill's prompt is right; None: exact
    refusal_tokens: TokenSpec = None  # None: found on the training prompts
    filter: bool = True  # whether prompts that are not treated as their class asks are removed
    thresholds: Mapping[str, Any] = field(default_factory=dict)  # arguments of `select`
    direction: Direction | None = None  # measured instead of extracting and selecting one
    benchmarks: Benchmarks | None = None  # None to skip them
    max_new_tokens: int = 512
    batch_size: int = 64
    seed: int = SEED
    controls: bool = False  # whether random directions, other layers' and the dose are measured
    identity: Sequence[Any] = ()  # of the weights: a commit, or the sizes and times of files


def read_protocol_prompts(
    model: str,
    harmful: str | None = None,
    harmless: str | None = None,
    harmful_test: str | None = None,
    seed: int = SEED,
    column: str | None = None,
) -> Prompts:
    """Read the prompts of the protocol: the paper's sets, an embedded model's own, or others.

    Harmful test prompts are removed from the train and validation prompts. Without ``harmful_test``
    they are JailbreakBench's if ``harmful`` is not given either, else a part of ``harmful``. A set
    that is too small is cut in the same proportions; one that names a source for each split
    (`prompts_for`) is not cut.
    """
    if model in EMBEDDED and not (harmful or harmless or harmful_test):
        own = {split: prompts_for(model, split, None, None) for split in SIZES}
        return {s: {c: list(p)[: SIZES[s]] for c, p in part.items()} for s, part in own.items()}
    if harmful_test is None and harmful is None:
        harmful_test = HARMFUL_TEST
    tested: list[str] = []
    if harmful_test is not None:
        asked = read_prompts(harmful_test, column)
        tested = split_prompts(asked, {"test": None}, seed)["test"][: SIZES["test"]]
    excluded = {prompt.strip().lower() for prompt in tested}
    cut: dict[str, dict[str, list[str]]] = {}
    for category, source in (("harmful", harmful or HARMFUL), ("harmless", harmless or HARMLESS)):
        parts = {
            split: split_prompts(
                [p for p in read_prompts(file, column) if p.strip().lower() not in excluded],
                {"all": None}, seed,
            )["all"]
            for split, file in split_sources(source).items()
        }  # fmt: skip
        every = parts.get("all")
        try:
            if every is None:
                cut[category] = parts
            else:
                sizes = split_sizes(len(every))
                if category == "harmful" and tested:
                    sizes |= {"test": 0}
                cut[category] = split_prompts(every, sizes, seed)
        except InputError as error:
            raise InputError(f"{category}: {error}") from None
        if category == "harmful" and tested:
            cut[category]["test"] = tested
        if missing := [split for split in SIZES if not cut[category].get(split)]:
            raise InputError(f"{category}: there is no prompt for {missing[0]}; expected one")
    return {split: {c: cut[c][split] for c in cut} for split in SIZES}


def read_paper_texts(chat: ChatFormat, count: int = PASSAGES) -> dict[str, list[Passage]]:
    """Read the texts of the paper's losses: beginnings of the Pile, and Alpaca's answers."""
    pile = [text for (text,) in read_columns(PILE, ["text"], count)]
    cut = {"truncation": True, "max_length": PASSAGE_TOKENS}
    ids = [list(tokens) for tokens in chat.tokenizer(pile, **cut)["input_ids"]] if pile else []
    pairs = read_columns(ALPACA, ["instruction", "output"], count, shuffle=SEED)
    return {
        "pile": [Passage(tokens) for tokens in ids if len(tokens) > 1],
        "alpaca": answers(chat, [(prompt, answer) for prompt, answer in pairs]),
    }
