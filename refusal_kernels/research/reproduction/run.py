"""The whole protocol of the paper on one model: every number that a row of the paper has.

Arditi et al. 2024 (arXiv 2406.11717), with the settings of the paper's code: 128 prompts per class
to read the direction from and 32 to choose it, filtered by refusal score, then refusals under no
edit, ablation, subtraction and addition, and what the edits cost. Each step is kept in a folder.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels import __version__
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json, write_json
from refusal_kernels.files.convert import Candidates, read
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.model import decoder_layers
from refusal_kernels.progress import Step, single_step
from refusal_kernels.research.evaluation.evidence import (
    ABLATED,
    ADDED,
    ON_DISTRIBUTION,
    SUBTRACTED,
    UNMODIFIED,
    gather_evidence,
)
from refusal_kernels.research.evaluation.outcomes import Rate, evaluate
from refusal_kernels.research.extraction.collect import mean_difference
from refusal_kernels.research.prompts import filtered
from refusal_kernels.research.reproduction.paper import BENCHMARKS, Material
from refusal_kernels.research.reproduction.rows import Found
from refusal_kernels.research.selection.algorithm import select
from refusal_kernels.research.selection.scoring import find_refusal_tokens
from refusal_kernels.weights.weights import orthogonalize


@dataclass
class Reproduction:
    """What was measured.

    Attributes
    ----------
    numbers : dict of str to Rate or float
        By quantity, named as the columns of ``paper.json``; scores and losses in nats, rates from 0
        to 1, benchmarks in percent.
    selection, evidence : dict
        `Selection.to_dict` and `Evidence.to_dict`.
    benchmarks : dict
        By edit and benchmark, what the harness found.
    prompts : dict of str to dict of str to int
        How many were used, by split and category.
    notes : list of str
        What could not be measured, and why.
    reused : list of str
        The steps that were not run again.
    """

    numbers: dict[str, Found]
    selection: dict[str, Any]
    evidence: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]
    prompts: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)


class Kept:
    """The results of steps in a folder: a step runs again only if something before it changed.

    Attributes
    ----------
    key : str
        Of all that was asked so far.
    part : Path
        Where the step that runs may keep what it has so far; removed when it is done.
    reused : list of str
        The steps that did not run.
    """

    def __init__(self, folder: Path, *depends: Any) -> None:
        self.folder, self.reused = folder, list[str]()
        folder.mkdir(exist_ok=True)
        self.part = folder / "none.part"
        self.key = _digest([__version__, *depends])

    def step(
        self, name: str, make: Callable[[], dict[str, Any]], *depends: Any, aside: bool = False
    ) -> dict[str, Any]:
        """Return what a step gave before for the same key, or run it and keep what it gives.

        The key is made of what the step depends on and of the steps before, but for those aside.
        """
        key = _digest([self.key, name, *depends])
        if not aside:
            self.key = key
        path = self.folder / f"{name}.json"
        if path.is_file():
            try:
                before = read_json(path)
            except InputError:  # damaged: made anew
                before = None
            if isinstance(before, dict) and before.get("key") == key:
                self.reused.append(name)
                result: dict[str, Any] = before["result"]
                return result
        self.part = self.folder / f"{name}-{key[:16]}.part"
        result = make()
        write_json(path, {"key": key, "result": result})
        self.part.unlink(missing_ok=True)
        return result


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def run(material: Material, folder: Path, step: Step) -> Reproduction:
    """Run the protocol, or what of it is not kept in the folder yet.

    Parameters
    ----------
    material
        Model, prompts, texts. The model's weights are edited in the end.
    folder
        Of candidates.safetensors and direction.safetensors, and of ``steps/``, where the results of
        the steps are kept; it is there.
    step
        Told of each part of the work and of its progress.

    Raises
    ------
    InputError
        If the model refuses or answers nothing, no candidate is left, or the direction that was
        given does not fit.
    """
    return _Run(material, folder, step).all()


class _Run:
    """The steps, in their order."""

    def __init__(self, material: Material, folder: Path, step: Step) -> None:
        self.material, self.folder, self.step = material, folder, step
        self.model, self.chat = material.model, ChatFormat.of(material.tokenizer)
        self.size, self.test = material.batch_size, material.prompts["test"]
        options = [self.chat.system, self.chat.thinking, str(next(self.model.parameters()).dtype)]
        self.kept = Kept(folder / "steps", material.name, list(material.identity), options)
        self.edited = False

    def all(self) -> Reproduction:
        material, kept, notes = self.material, self.kept, list[str]()
        asked = {split: material.prompts[split] for split in ("train", "validation")}
        used = kept.step("prompts", self.filter, asked, material.refusal_tokens)
        candidates = self.candidates(used["train"])
        given = material.direction and material.direction.vector.tolist()
        selection = kept.step("selection", lambda: self.select(candidates, used), given)
        direction = Candidates(candidates, material.name).at(
            selection["layer"], selection["position"]
        )
        direction.save(self.folder / "direction.safetensors")

        texts = {n: [[list(p.ids), p.start] for p in own] for n, own in material.texts.items()}
        depends = [self.test, material.skills, material.max_new_tokens, material.seed, texts]
        evidence = kept.step(
            "evidence",
            lambda: self.ask(direction, candidates, used["refusal_tokens"]),
            *(*depends, material.controls),
        )
        benchmarks = self.benchmarks("baseline", direction)
        orthogonal = kept.step("orthogonalized", lambda: self.ask_edited(direction))
        if why := orthogonal.get("refused"):
            notes.append(f"orthogonalized weights are not measured: {why}")
        else:
            benchmarks |= self.benchmarks("orthogonalized", direction)
        return Reproduction(
            numbers=_numbers(selection, evidence, orthogonal, benchmarks),
            selection=selection,
            evidence=evidence,
            benchmarks=benchmarks,
            prompts={
                split: {category: len(own) for category, own in part.items()}
                for split, part in {**material.prompts, **used}.items()
                if split != "refusal_tokens"
            },
            notes=notes,
            reused=kept.reused,
        )

    def filter(self) -> dict[str, Any]:
        """Keep what the model refuses and answers, of the prompts that the direction comes from."""
        train, tokens = self.material.prompts["train"], self.material.refusal_tokens
        with single_step(self.step("Filter by refusal score")):
            if tokens is None:
                tokens = find_refusal_tokens(
                    self.model, self.chat, train["harmful"], train["harmless"], self.size
                )
            options: dict[str, Any] = {"refusal_tokens": tokens, "batch_size": self.size}
            return {"refusal_tokens": tokens} | {
                split: filtered(self.model, self.chat, self.material.prompts[split], **options)
                for split in ("train", "validation")
            }

    def candidates(self, train: Mapping[str, list[str]]) -> Tensor:
        """The mean differences, or the one direction that was given; float32, as `Candidates`."""
        if self.material.direction is not None:
            return _alone(self.model, self.material.direction)
        file = self.folder / "candidates.safetensors"
        there = _read_candidates(file)

        def extract() -> dict[str, Any]:
            nonlocal there
            there = mean_difference(
                self.model, self.chat, train["harmful"], train["harmless"],
                batch_size=self.size, checkpoint=self.kept.part,
                progress=self.step("Extract: mean differences"),
            )  # fmt: skip
            Candidates(there, self.material.name).save(file)
            return {"sha256": _bytes(there), "norm": there.norm(dim=-1).tolist()}

        result = self.kept.step("candidates", extract)
        if there is None or _bytes(there) != result["sha256"]:  # another file than was kept
            self.kept.reused.remove("candidates")
            extract()
        assert there is not None
        return there

    def select(self, candidates: Tensor, used: Mapping[str, Any]) -> dict[str, Any]:
        """Choose; a direction that was given is only measured, whatever its scores."""
        anyway: dict[str, Any] = {}
        if self.material.direction is not None:
            anyway = {"kl_threshold": torch.inf, "induce_threshold": -torch.inf, "prune_last": 0.0}
        return select(
            self.model, self.chat, candidates,
            used["validation"]["harmful"], used["validation"]["harmless"],
            refusal_tokens=used["refusal_tokens"], batch_size=self.size, checkpoint=self.kept.part,
            model_name=self.material.name, progress=self.step("Select: three scores"), **anyway,
        ).to_dict()  # fmt: skip

    def ask(self, direction: Direction, candidates: Tensor, tokens: list[int]) -> dict[str, Any]:
        """Refusals, losses and skills under each edit; the controls and the dose where wanted."""
        material, controls = self.material, dict[str, Any]()
        if not material.controls:
            controls = {"strengths": (), "random_controls": 0, "layer_controls": 0}
        return gather_evidence(
            self.model, self.chat, direction,
            harmful=self.test["harmful"], harmless=self.test["harmless"],
            candidates=None if material.direction else candidates, refusal_tokens=tokens,
            skills=material.skills, texts=material.texts, seed=material.seed,
            max_new_tokens=material.max_new_tokens, batch_size=self.size, step=self.step,
            **controls,
        ).to_dict()  # fmt: skip

    def ask_edited(self, direction: Direction) -> dict[str, Any]:
        """Refusals and skills of the edited weights; or why this family's are not edited."""
        try:
            self.edit(direction)
        except InputError as error:
            return {"refused": str(error)}
        outcome = evaluate(
            self.model, self.chat, harmful=self.test["harmful"], harmless=self.test["harmless"],
            interventions={"orthogonalized": None}, skills=self.material.skills,
            max_new_tokens=self.material.max_new_tokens, batch_size=self.size,
            progress=self.step("Orthogonalized"),
        )["orthogonalized"].to_dict()  # fmt: skip
        return {key: outcome[key] for key in ("harmful", "harmless", "skills")}

    def edit(self, direction: Direction) -> None:
        """Write the direction out of the weights, once."""
        if not self.edited:
            orthogonalize(self.model, direction)
            self.edited = True

    def benchmarks(self, edit: str, direction: Direction) -> dict[str, Any]:
        """What the harness finds, where it is asked for; by the name of the edit."""
        harness = self.material.benchmarks
        if harness is None:
            return {}

        def ask() -> dict[str, Any]:
            if edit == "orthogonalized":
                self.edit(direction)
            with single_step(self.step(f"Benchmarks: {edit}")):
                return harness(self.model, self.chat.tokenizer)

        depends = BENCHMARKS, harness.limit, harness.seed
        return {edit: self.kept.step(f"benchmarks_{edit}", ask, *depends, aside=True)}


def _read_candidates(file: Path) -> Tensor | None:
    try:
        there = read(file)
    except InputError:  # missing or damaged: made anew
        return None
    return there.tensor if isinstance(there, Candidates) else None


def _bytes(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _alone(model: Any, direction: Direction) -> Tensor:
    """Candidates of which all but one are zero, and so are not measured."""
    layers = len(decoder_layers(model))
    if direction.layer is None or direction.layer >= layers:
        raise InputError(
            f"the direction was read at layer {direction.layer}; expected one of {layers}, for it "
            "is added there"
        )
    position = -1 if direction.position is None else direction.position
    candidates = torch.zeros(-position, layers, direction.hidden)
    candidates[position, direction.layer] = direction.vector
    return candidates


def _numbers(
    selection: Mapping[str, Any],
    evidence: Mapping[str, Any],
    orthogonal: Mapping[str, Any],
    benchmarks: Mapping[str, Mapping[str, Any]],
) -> dict[str, Found]:
    """All numbers by the names of the paper's columns."""
    judge, conditions = evidence["judges"][0]["name"], evidence["conditions"]
    edited = "refused" not in orthogonal

    def rate(known: Mapping[str, Any]) -> Rate:
        return Rate(known["k"], known["n"])

    def answered(refused: Mapping[str, Any]) -> Rate:
        return Rate(refused["n"] - refused["k"], refused["n"])

    found: dict[str, Found] = {f"{s}_score": selection[s] for s in ("bypass", "induce", "kl")}
    harmful = {"baseline": UNMODIFIED, "ablation": ABLATED, "subtraction": SUBTRACTED}
    harmless = {"baseline": UNMODIFIED, "addition": ADDED}
    for name, part, edits in (
        ("substring_asr", "harmful", harmful),
        ("harmless_answer_rate", "harmless", harmless),
    ):
        for what, condition in edits.items():
            found[f"{name}_{what}"] = answered(conditions[condition]["rates"][part][judge])
        if edited:
            found[f"{name}_orthogonalized"] = answered(orthogonal[part])
    # where the paper's code measures losses, it adds with coefficient -1
    losses = {"baseline": UNMODIFIED, "ablation": ABLATED, "addition": SUBTRACTED}
    for text in conditions[UNMODIFIED]["losses"]:
        name = "on_distribution" if text == ON_DISTRIBUTION else text
        for what, condition in losses.items():
            found[f"{name}_{what}"] = conditions[condition]["losses"][text]["nats"]
    for task, own in conditions[UNMODIFIED]["skills"].items():
        found[f"skill_{task}_baseline"] = rate(own)
        if edited:
            found[f"skill_{task}_orthogonalized"] = rate(orthogonal["skills"][task])
    for edit, tasks in benchmarks.items():
        for task, metrics in tasks.items():
            (metric,) = metrics.values()
            found[f"{task}_{edit}"] = 100 * metric["value"]
    return found
