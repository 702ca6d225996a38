"""The inputs of the paper's protocol: its prompts, its texts, its benchmarks.

Arditi et al. 2024 (arXiv 2406.11717), appendix A and the paper's code. The toy model has inputs of
its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.research.evaluation.likelihood import Passage, answers
from refusal_kernels.research.prompts import prompts_for
from refusal_kernels.research.sources import (
    SEED,
    SIZES,
    Dataset,
    read_columns,
    read_prompts,
    split_prompts,
    split_sizes,
)
from refusal_kernels.toy.world import phrase, plan, requests

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
    """The paper's four benchmarks in the lm-evaluation-harness.

    Attributes
    ----------
    manager
        The result of `refusal_kernels.research.evaluation.lm_eval.find_tasks`.
    limit : float or None
        Only so many examples of each task (below 1: this share).
    batch_size, seed : int
        Requests at once; the seed of the shown examples.
    """

    manager: Any
    limit: float | None = None
    batch_size: int = 8
    seed: int = SEED

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
    """The inputs of the protocol.

    Attributes
    ----------
    name : str
        The model's name in the report.
    model, tokenizer
        A transformers causal language model, whose weights are edited in the end, and its
        tokenizer or a `ChatFormat`.
    prompts : dict
        By split and category.
    texts : dict of str to list of Passage
        Their cross-entropy is measured, by name: "pile", "alpaca".
    skills : dict of str to list
        Tasks with one right answer: pairs of prompt and answer, by name.
    refusal_tokens : list of int or None
        Tokens that begin a refusal; None: found on the training prompts.
    direction : Direction or None
        Measured instead of extracting and selecting one.
    benchmarks : Benchmarks or None
        None to skip them.
    max_new_tokens, batch_size, seed
        As for `refusal_kernels.evaluate`.
    controls : bool
        Whether random directions, those of other layers, and the dose are measured too.
    identity : list
        Identifies the weights: a commit, or the sizes and times of files.
    """

    name: str
    model: Any
    tokenizer: Any
    prompts: Prompts
    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)
    skills: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    refusal_tokens: list[int] | None = None
    direction: Direction | None = None
    benchmarks: Benchmarks | None = None
    max_new_tokens: int = 512
    batch_size: int = 32
    seed: int = SEED
    controls: bool = False
    identity: Sequence[Any] = ()


def read_protocol_prompts(
    model: str,
    harmful: str | None = None,
    harmless: str | None = None,
    harmful_test: str | None = None,
    seed: int = SEED,
) -> Prompts:
    """Read the prompts of the protocol: the paper's sets, the toy model's own, or others.

    Harmful test prompts are removed from the train and validation prompts. A set that is too small
    is cut in the same proportions.

    Parameters
    ----------
    model
        "toy" for the toy model's own prompts, unless others are given.
    harmful, harmless, harmful_test
        As `read_prompts` takes them. Without ``harmful_test`` the test prompts are JailbreakBench's
        if ``harmful`` is not given either, else a part of ``harmful``.
    seed
        Of the cut.

    Returns
    -------
    dict of str to dict of str to list of str
        By split and category.

    Raises
    ------
    InputError
        As `read_prompts` and `split_prompts`.
    """
    if model == "toy" and not (harmful or harmless or harmful_test):
        parts = {split: prompts_for("toy", split, None, None) for split in SIZES}
        return {s: {c: list(p)[: SIZES[s]] for c, p in part.items()} for s, part in parts.items()}
    if harmful_test is None and harmful is None:
        harmful_test = HARMFUL_TEST
    tested: list[str] = []
    if harmful_test is not None:
        every = read_prompts(harmful_test)
        tested = split_prompts(every, {"test": None}, seed)["test"][: SIZES["test"]]
    excluded = {prompt.strip().lower() for prompt in tested}
    cut = {}
    for category, source in (("harmful", harmful or HARMFUL), ("harmless", harmless or HARMLESS)):
        every = [p for p in read_prompts(source) if p.strip().lower() not in excluded]
        every = split_prompts(every, {"all": None}, seed)["all"]
        try:
            sizes = split_sizes(len(every))
            if category == "harmful" and tested:
                sizes |= {"test": 0}
            cut[category] = split_prompts(every, sizes, seed)
        except InputError as error:
            raise InputError(f"{category}: {error}") from None
    if tested:
        cut["harmful"]["test"] = tested
    return {split: {c: cut[c][split] for c in cut} for split in SIZES}


def read_paper_texts(chat: ChatFormat, count: int = PASSAGES) -> dict[str, list[Passage]]:
    """Read the texts of the paper's losses: beginnings of the Pile, and Alpaca's answers.

    Raises
    ------
    InputError
        As `read_columns`.
    """
    pile = [text for (text,) in read_columns(PILE, ["text"], count)]
    cut = {"truncation": True, "max_length": PASSAGE_TOKENS}
    ids = [list(tokens) for tokens in chat.tokenizer(pile, **cut)["input_ids"]] if pile else []
    pairs = read_columns(ALPACA, ["instruction", "output"], count, shuffle=SEED)
    return {
        "pile": [Passage(tokens) for tokens in ids if len(tokens) > 1],
        "alpaca": answers(chat, [(prompt, answer) for prompt, answer in pairs]),
    }


def toy_texts(chat: ChatFormat) -> dict[str, list[Passage]]:
    """Return the toy model's text: the helpful answers to its harmless test prompts."""
    asked = requests("harmless", "test")[: SIZES["test"]]
    return {"plans": answers(chat, [(phrase(request), plan(request)) for request in asked])}
