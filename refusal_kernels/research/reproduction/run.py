"""The whole protocol of the paper on one model: every number that a row of the paper has.

Arditi et al. 2024 (arXiv 2406.11717), with the settings of the paper's code: 128 prompts per class
for extraction and 32 for selection, filtered by refusal score; then refusals and cross-entropy
under no edit, ablation, subtraction and addition. The result of each step is kept in a folder.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Candidates, Direction, Means
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.model import layer_count
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.progress import Step, single_step
from refusal_kernels.research.evaluation.evidence import (
    ABLATED,
    ADDED,
    ON_DISTRIBUTION,
    SUBTRACTED,
    UNMODIFIED,
    evaluate,
)
from refusal_kernels.research.evaluation.outcomes import measure_outcomes
from refusal_kernels.research.evaluation.rates import Rate
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.extraction.distributed import is_spread
from refusal_kernels.research.prompts import filtered
from refusal_kernels.research.reproduction.paper import BENCHMARKS, ProtocolInputs
from refusal_kernels.research.reproduction.rows import Measured
from refusal_kernels.research.reproduction.steps import StepCache
from refusal_kernels.research.selection.algorithm import select
from refusal_kernels.research.selection.scoring import find_refusal_tokens, given_tokens
from refusal_kernels.weights.in_memory import orthogonalize


@dataclass
class Reproduction:
    """The measurements of one run of the protocol."""

    # named as the columns of paper.json: nats, rates from 0 to 1, benchmarks in percent
    numbers: dict[str, Measured]
    selection: dict[str, Any]  # `Selection.to_dict`
    evidence: dict[str, Any]  # `Evidence.to_dict`; empty if no direction was selected
    benchmarks: dict[str, dict[str, Any]]  # by edit and benchmark: the harness's result
    prompts: dict[str, dict[str, int]]  # how many were used, by split and category
    removed: dict[str, Any]  # those that the filter removed, by split and category
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why
    reused: list[str] = field(default_factory=list)  # the steps whose kept results were used


def run(inputs: ProtocolInputs, folder: Path, step: Step) -> Reproduction:
    """Run the steps of the protocol whose results are not kept in the folder yet.

    The folder exists; it gets candidates.safetensors, direction.safetensors and ``steps/``, the
    results of the steps. The model's weights are edited in the end.
    """
    return _Protocol(inputs, folder, step).run()


class _Protocol:
    """The steps, in their order."""

    def __init__(self, inputs: ProtocolInputs, folder: Path, step: Step) -> None:
        self.inputs, self.folder, self.announce = inputs, folder, step
        self.model, self.chat = inputs.model, ChatFormat.of(inputs.tokenizer)
        self.size, self.test = inputs.batch_size, inputs.prompts["test"]
        self.measured: dict[str, Any] = {
            "harmful": self.test["harmful"], "harmless": self.test["harmless"],
            "skills": inputs.skills, "match": inputs.match, "max_new_tokens": inputs.max_new_tokens,
            "batch_size": self.size,
        }  # fmt: skip
        chat, model = self.chat, self.model
        served = isinstance(model, ServedModel)
        runs = [model.about, str(model.dtype)] if served else str(next(model.parameters()).dtype)
        options = [chat.system, chat.thinking, chat.answer_prefix, chat.date, runs]
        self.cache = StepCache(folder / "steps", inputs.name, list(inputs.identity), options)
        self.spread = not served and is_spread(model)
        self.edited = False

    @property
    def part(self) -> Path | None:
        """The file for the state of the step that runs, if it can resume.

        Processes that share a model hold different parts of it, so no state fits all of them.
        """
        return None if self.spread else self.cache.part

    def run(self) -> Reproduction:
        inputs, cache, notes = self.inputs, self.cache, list[str]()
        asked = {split: inputs.prompts[split] for split in ("train", "validation")}
        used = cache.step("prompts", self.filter, asked, inputs.refusal_tokens, inputs.filter)
        used |= {split: _as_asked(used[split], asked[split]) for split in asked}
        candidates = self.candidates(used["train"])
        given = inputs.direction and [
            inputs.direction.vector.tolist(), inputs.direction.layer, inputs.direction.position
        ]  # fmt: skip
        selection = cache.step(
            "selection", lambda: self.select(candidates, used), given, choices=inputs.thresholds
        )
        counted = {
            split: {category: len(prompts) for category, prompts in part.items()}
            for split, part in {
                **inputs.prompts, "train": used["train"], "validation": used["validation"]
            }.items()
        }  # fmt: skip
        if selection["problem"]:
            notes.append(selection["problem"])
        if selection["position"] is None:
            found = {"selection": selection, "prompts": counted, "removed": used["removed"]}
            return Reproduction(
                numbers={}, evidence={}, benchmarks={}, notes=notes, reused=cache.reused, **found
            )
        direction = candidates.at(selection["layer"], selection["position"])
        direction.save(self.folder / "direction.safetensors")

        texts = {n: [[list(p.ids), p.start] for p in text] for n, text in inputs.texts.items()}
        depends = [self.test, inputs.skills, inputs.max_new_tokens, inputs.seed, texts]
        evidence = cache.step(
            "evidence",
            lambda: self.evaluate(direction, candidates, used["refusal_tokens"]),
            *(*depends, inputs.controls),
        )
        benchmarks = self.benchmarks("unmodified", direction)
        orthogonalized = cache.step("orthogonalized", lambda: self.evaluate_edited(direction))
        if why := orthogonalized.get("refused"):
            notes.append(f"orthogonalized weights are not measured: {why}")
        else:
            benchmarks |= self.benchmarks("orthogonalized", direction)
        return Reproduction(
            numbers=_numbers(selection, evidence, orthogonalized, benchmarks),
            selection=selection,
            evidence=evidence,
            benchmarks=benchmarks,
            prompts=counted,
            removed=used["removed"],
            notes=notes,
            reused=cache.reused,
        )

    def filter(self) -> dict[str, Any]:
        """Keep the harmful prompts that the model refuses and the harmless ones it answers."""
        every, train = self.inputs.prompts, self.inputs.prompts["train"]
        splits = ("train", "validation")
        with single_step(self.announce("Filter by refusal score")):
            tokens = given_tokens(self.model, self.chat, self.inputs.refusal_tokens)
            if tokens is None:
                tokens = find_refusal_tokens(
                    self.model, self.chat, train["harmful"], train["harmless"], self.size
                )
            result: dict[str, Any] = {"refusal_tokens": tokens, "removed": {}}
            if not self.inputs.filter:
                return result | {split: every[split] for split in splits}
            options: dict[str, Any] = {"refusal_tokens": tokens, "batch_size": self.size}
            for split in splits:
                left = filtered(self.model, self.chat, every[split], **options)
                result[split], result["removed"][split] = left.kept, left.removed
            return result

    def candidates(self, train: Mapping[str, list[str]]) -> Candidates:
        """Return the mean differences, or the given direction alone."""
        if self.inputs.direction is not None:
            return _alone(self.model, self.inputs.direction, self.inputs.name)
        file = self.folder / "candidates.safetensors"
        kept = _read_candidates(file)

        def extract() -> dict[str, Any]:
            nonlocal kept
            kept = mean_difference(
                self.model, self.chat, train["harmful"], train["harmless"],
                batch_size=self.size, model_name=self.inputs.name, checkpoint=self.part,
                progress=self.announce("Extract: mean differences"),
            )  # fmt: skip
            kept.save(file)
            return {"sha256": _sha256(kept), "norm": kept.vectors.norm(dim=-1).tolist()}

        result = self.cache.step("candidates", extract)
        if kept is None or _sha256(kept) != result["sha256"]:  # not the file of the kept step
            self.cache.reused.remove("candidates")
            extract()
        assert kept is not None
        return kept

    def select(self, candidates: Candidates, used: Mapping[str, Any]) -> dict[str, Any]:
        """Select; a given direction is only measured, whatever its scores."""
        thresholds = dict(self.inputs.thresholds)
        if self.inputs.direction is not None:
            thresholds = {
                "kl_threshold": math.inf,
                "induce_threshold": -math.inf,
                "prune_last": 0.0,
            }
        return select(
            self.model, self.chat, candidates,
            used["validation"]["harmful"], used["validation"]["harmless"],
            refusal_tokens=used["refusal_tokens"], batch_size=self.size, checkpoint=self.part,
            progress=self.announce("Select: three scores"), **thresholds,
        ).to_dict()  # fmt: skip

    def evaluate(
        self, direction: Direction, candidates: Candidates, tokens: list[int]
    ) -> dict[str, Any]:
        """Measure refusals, losses and skills under each edit; controls and dose where wanted."""
        inputs, controls = self.inputs, dict[str, Any]()
        if not inputs.controls:
            controls = {"strengths": (), "random_controls": 0, "layer_controls": 0}
        return evaluate(
            self.model, self.chat, direction, **self.measured, **controls,
            candidates=None if inputs.direction else candidates, refusal_tokens=tokens,
            texts=inputs.texts, seed=inputs.seed, step=self.announce,
        ).to_dict()  # fmt: skip

    def evaluate_edited(self, direction: Direction) -> dict[str, Any]:
        """Measure refusals and skills of the edited weights; "refused" if they are not edited."""
        if isinstance(self.model, ServedModel):
            return {"refused": "an engine's weights are not edited in place"}
        try:
            self.edit(direction)
        except InputError as error:
            return {"refused": str(error)}
        outcome = measure_outcomes(
            self.model, self.chat, **self.measured, interventions={"orthogonalized": None},
            progress=self.announce("Orthogonalized"),
        )["orthogonalized"].to_dict()  # fmt: skip
        return {key: outcome[key] for key in ("harmful", "harmless", "skills")}

    def edit(self, direction: Direction) -> None:
        """Orthogonalize the weights, once."""
        if not self.edited:
            orthogonalize(self.model, direction)
            self.edited = True

    def benchmarks(self, edit: str, direction: Direction) -> dict[str, Any]:
        """Run the benchmarks, where they are asked for; return them by the name of the edit."""
        harness = self.inputs.benchmarks
        if harness is None:
            return {}

        def measure() -> dict[str, Any]:
            if edit == "orthogonalized":
                self.edit(direction)
            with single_step(self.announce(f"Benchmarks: {edit}")):
                return harness(self.model, self.chat.tokenizer)

        depends = BENCHMARKS, harness.limit, harness.seed
        return {edit: self.cache.step(f"benchmarks_{edit}", measure, *depends, aside=True)}


def _as_asked(
    kept: Mapping[str, Sequence[str]], asked: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the prompts of a kept result as they were asked: JSON has no turns."""
    by_text = {str(prompt): prompt for part in asked.values() for prompt in part}
    return {name: [by_text[prompt] for prompt in prompts] for name, prompts in kept.items()}


def _read_candidates(file: Path) -> Candidates | None:
    try:
        return Candidates.load(file)
    except InputError:  # missing, damaged or something else: extracted again
        return None


def _sha256(candidates: Candidates) -> str:
    tensors = (candidates.vectors, *(candidates.means or ()))
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def _alone(model: Any, direction: Direction, name: str) -> Candidates:
    """Return candidates that are zero except for one; select does not measure zero ones."""
    layers = layer_count(model)
    if direction.layer is None or direction.layer >= layers:
        raise InputError(
            f"the direction was read at layer {direction.layer}; expected one of {layers}, "
            "as it is added there"
        )
    position = -1 if direction.position is None else direction.position

    def among_zeros(vector: Tensor) -> Tensor:
        vectors = torch.zeros(-position, layers, direction.hidden)
        vectors[position, direction.layer] = vector
        return vectors

    means = direction.means and Means(*map(among_zeros, direction.means))
    return Candidates(among_zeros(direction.vector), name, means=means)


def _numbers(
    selection: Mapping[str, Any],
    evidence: Mapping[str, Any],
    orthogonalized: Mapping[str, Any],
    benchmarks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Measured]:
    """Return all numbers by the names of the paper's columns."""
    judge, conditions = evidence["judges"][0]["name"], evidence["conditions"]
    edited = "refused" not in orthogonalized

    def answered(refused: Mapping[str, Any]) -> Rate:
        return Rate(refused["n"] - refused["k"], refused["n"], refused.get("unfinished", 0))

    numbers: dict[str, Measured] = {f"{s}_score": selection[s] for s in ("bypass", "induce", "kl")}
    harmful = {"unmodified": UNMODIFIED, "ablation": ABLATED, "subtraction": SUBTRACTED}
    harmless = {"unmodified": UNMODIFIED, "addition": ADDED}
    for name, part, edits in (
        ("substring_asr", "harmful", harmful),
        ("harmless_answer_rate", "harmless", harmless),
    ):
        for edit, condition in edits.items():
            numbers[f"{name}_{edit}"] = answered(conditions[condition]["rates"][part][judge])
        if edited:
            numbers[f"{name}_orthogonalized"] = answered(orthogonalized[part])
    # for its losses the paper's code adds the direction with coefficient -1
    losses = {"unmodified": UNMODIFIED, "ablation": ABLATED, "addition": SUBTRACTED}
    for text in conditions[UNMODIFIED]["losses"]:
        name = "on_distribution" if text == ON_DISTRIBUTION else text
        for edit, condition in losses.items():
            numbers[f"{name}_{edit}"] = conditions[condition]["losses"][text]["nats"]
    skills = {"unmodified": conditions[UNMODIFIED]["skills"]}
    if edited:
        skills["orthogonalized"] = orthogonalized["skills"]
    for task in skills["unmodified"]:
        for edit, rates in skills.items():
            numbers[f"skill_{task}_{edit}"] = Rate(rates[task]["k"], rates[task]["n"])
    for edit, tasks in benchmarks.items():
        for task, metrics in tasks.items():
            (metric,) = metrics.values()
            numbers[f"{task}_{edit}"] = 100 * metric["value"]
    return numbers
