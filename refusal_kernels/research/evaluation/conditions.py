"""The conditions of an evaluation, and the runner that measures a model under each of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import NoNumbers, NotFinite, check_numbers
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.generate import decoded, generate_ids
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.hf.model import input_device
from refusal_kernels.hf.padding import fitted
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.interventions import Intervention
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.judges import Judge, NoAnswers, judged
from refusal_kernels.research.evaluation.likelihood import (
    Loss,
    Passage,
    check_passages,
    cross_entropy,
    loss_of,
    served_nats,
)
from refusal_kernels.research.evaluation.rates import Rate, to_json
from refusal_kernels.research.evaluation.tasks import Match, exact, exact_match
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score
from refusal_kernels.research.steering import Route, steering

DESTROYED_KL = 1.0  # nats: of an edit with more, a next token says nothing of the model


@dataclass
class Condition:
    """The measurements under one intervention, by set of prompts, task or text."""

    name: str  # "unmodified", "ablated", "random 2 added", "layer 5 ablated", ...
    cosine: float | None = None  # of a control: of its direction with the examined one
    rates: dict[str, dict[str, Rate]] = field(default_factory=dict)  # by set, then by judge
    refusal_scores: dict[str, float] = field(default_factory=dict)  # mean log-odds, nats
    kl: dict[str, float] = field(default_factory=dict)  # mean KL(unmodified || this), nats
    skills: dict[str, Rate] = field(default_factory=dict)  # right answers, by task
    losses: dict[str, Loss] = field(default_factory=dict)  # cross-entropy, by text
    completions: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dict(to_json(vars(self)))


@dataclass(frozen=True)
class DosePoint:
    """The measurements at one strength of an intervention, judged by the first judge."""

    strength: float  # of the ablation, or the coefficient of the addition; 0 is no edit
    harmful: Rate
    harmless: Rate
    refusal_scores: dict[str, float]  # by set of prompts: the mean, nats; empty without tokens
    kl: float  # mean KL(unmodified || steered) of the next token on the harmless prompts, nats
    loss: Loss | None  # cross-entropy on `Evidence.dose_text`

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dict(to_json(vars(self)))


class _Answered(NamedTuple):
    """What one edit does to a set of prompts."""

    texts: list[str]
    score: float | None  # the mean refusal score; None without refusal tokens
    kl: float  # the mean


class Broken(InputError):
    """An edit under which a model gave NaN or infinity."""


@contextlib.contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Say under which edit a model gave no numbers; `names` has that of each row, or of all."""
    try:
        yield
    except NoNumbers as error:
        raise Broken(f"{names[error.row % len(names)]}: {error}") from None
    except NotFinite as error:
        raise Broken(f"{names[0]}: {error}") from None


@dataclass
class ConditionRunner:
    """Measures a model on sets of prompts, under one edit after the other or many at once."""

    model: Any
    chat: ChatFormat
    sets: Mapping[str, list[str]]  # "harmful" and "harmless" among them
    judges: Sequence[Judge]
    tokens: Sequence[int] | None  # the refusal tokens; None for no refusal scores
    max_new_tokens: int
    batch_size: int
    # by set: those of the unmodified model after every prompt, float32 [prompts, vocabulary]
    logits: dict[str, Tensor] = field(init=False)
    notes: list[str] = field(default_factory=list)  # what was not measured, and why

    def __post_init__(self) -> None:
        self.logits = {
            name: last_logits(self.model, self.chat, prompts, self.batch_size)
            for name, prompts in self.sets.items()
        }

    def answer(self, prompts: Sequence[str], **more: Any) -> list[list[int]]:
        """Answer prompts greedily; return tokens."""
        return generate_ids(
            self.model, self.chat, prompts, self.max_new_tokens, self.batch_size, **more
        )

    def unmodified(self, condition: Condition, progress: Progress) -> list[list[int]]:
        """Measure the unmodified model; return its answers to the harmless prompts."""
        answers = {}
        for number, (part, prompts) in enumerate(self.sets.items(), 1):
            answers[part] = self.answer(prompts)
            self._judge(condition, part, decoded(self.chat, answers[part]))
            if self.tokens is not None:
                score = refusal_score(self.logits[part], self.tokens).mean()
                condition.refusal_scores[part] = float(score)
            progress(number, len(self.sets))
        return answers["harmless"]

    def measure(
        self,
        edits: Mapping[str, Intervention],
        wanted: Mapping[str, Sequence[str]],
        conditions: Mapping[str, Condition],
        progress: Progress,
    ) -> None:
        """Measure many edits together: every row of a batch, or every request, has its own.

        `wanted` has the names of the edits to measure on each set of prompts. The results go to
        `conditions`.
        """
        asked = [(part, name) for part, names in wanted.items() for name in names]
        names = list(edits)
        with steering(self.model, list(edits.values())) as route:
            found = self._answered(asked, names, route, progress)
            for (part, name), answered in zip(asked, found, strict=True):
                condition = conditions[name]
                condition.kl[part] = answered.kl
                if answered.score is not None:
                    condition.refusal_scores[part] = answered.score
                with route([names.index(name)]):  # a judge may run the model
                    self._judge(condition, part, answered.texts)

    def capability(
        self,
        edits: Mapping[str, Intervention | None],
        conditions: Mapping[str, Condition],
        skills: Mapping[str, Sequence[tuple[str, str]]],
        match: Match | None,
        passages: Mapping[str, Sequence[Passage]],
        progress: Progress,
    ) -> None:
        """Measure right answers and cross-entropy under each of the edits; None for no edit."""
        if isinstance(self.model, ServedModel):  # all of it in one queue
            self._served_capability(edits, conditions, skills, match, passages, progress)
            return
        total, done = len(edits) * (len(skills) + len(passages)), 0
        for name, edit in edits.items():
            steered = contextlib.nullcontext() if edit is None else steering(self.model, [edit])
            with steered, _naming([name]):
                for task, items in skills.items():
                    texts = decoded(self.chat, self.answer([prompt for prompt, _ in items]))
                    right = exact_match(texts, [answer for _, answer in items], match or exact)
                    conditions[name].skills[task] = right
                    progress(done := done + 1, total)
                for text, scored in passages.items():
                    conditions[name].losses[text] = self._loss(scored)
                    progress(done := done + 1, total)

    def _served_capability(
        self,
        edits: Mapping[str, Intervention | None],
        conditions: Mapping[str, Condition],
        skills: Mapping[str, Sequence[tuple[str, str]]],
        match: Match | None,
        passages: Mapping[str, Sequence[Passage]],
        progress: Progress,
    ) -> None:
        questions = [prompt for items in skills.values() for prompt, _ in items]
        if questions:
            with self.model.under([edit for edit in edits.values() for _ in questions]):
                ids = self.answer(questions * len(edits), progress=progress)
            texts = iter(decoded(self.chat, ids))
            for name in edits:
                for task, items in skills.items():
                    right = [next(texts) for _ in items], [answer for _, answer in items]
                    conditions[name].skills[task] = exact_match(*right, match or exact)
        for part in passages.values():
            check_passages(part)
        scored = [passage for part in passages.values() for passage in part]
        if scored:
            with self.model.under([edit for edit in edits.values() for _ in scored]):
                rows = iter(served_nats(self.model, scored * len(edits)))
            for name in edits:
                for text, part in passages.items():
                    with _naming([name]):
                        conditions[name].losses[text] = loss_of([next(rows) for _ in part])

    def dose(
        self,
        edit: Intervention,
        strengths: Sequence[float],
        passages: Sequence[Passage] | None,
        progress: Progress,
    ) -> list[DosePoint]:
        """Measure one edit at several strengths, in ascending order, all of them together.

        A note names those that an engine refuses, and those under which no answer begins or the
        model gives no numbers.
        """
        strengths = [strength for strength in sorted(strengths) if self._serves(edit.at(strength))]
        noted = len(self.notes)
        try:
            return self._points(edit, strengths, passages, progress)
        except Broken:  # under one of them: each alone
            del self.notes[noted:]
            points = list[DosePoint]()
            for done, strength in enumerate(strengths, 1):
                try:
                    points += self._points(edit, [strength], passages, lambda *_: None)
                except Broken as error:
                    self.notes.append(f"strength {strength:g} destroys the model: {error}")
                progress(done, len(strengths))
            return points

    def _points(
        self,
        edit: Intervention,
        strengths: Sequence[float],
        passages: Sequence[Passage] | None,
        progress: Progress,
    ) -> list[DosePoint]:
        """Measure one edit at several strengths together."""
        points, parts = list[DosePoint](), ("harmful", "harmless")
        if not strengths:
            return points
        names = [f"{type(edit).__name__} at strength {strength:g}" for strength in strengths]
        asked = [(part, name) for name in names for part in parts]
        with steering(self.model, [edit.at(strength) for strength in strengths]) as route:
            every = iter(self._answered(asked, names, route, progress))
            nats = None
            if passages and isinstance(self.model, ServedModel):  # of all strengths in one queue
                check_passages(passages)
                with route([number for number in range(len(strengths)) for _ in passages]):
                    nats = iter(served_nats(self.model, [*passages] * len(strengths)))
            for number, strength in enumerate(strengths):
                found = {part: next(every) for part in parts}
                scored = None if nats is None else [next(nats) for _ in passages or ()]
                with route([number]), _naming([names[number]]):
                    try:
                        rates = {
                            part: judged(self.judges[0], self.sets[part], found[part].texts)
                            for part in parts
                        }
                    except NoAnswers as error:
                        self.notes.append(f"strength {strength:g} is not measured: {error}")
                        continue
                    loss = None if scored is None else loss_of(scored)
                    if passages and scored is None:
                        loss = self._loss(passages)
                scores = {p: f.score for p, f in found.items() if f.score is not None}
                kl = found["harmless"].kl
                points.append(DosePoint(strength, **rates, refusal_scores=scores, kl=kl, loss=loss))
        return points

    def _serves(self, edit: Intervention) -> bool:
        why = self.model.refusal(edit) if isinstance(self.model, ServedModel) else None
        if why is not None:
            self.notes.append(f"strength {edit.strength:g} is not measured: {why}")
        return why is None

    def _answered(
        self,
        asked: Sequence[tuple[str, str]],
        names: Sequence[str],
        route: Route,
        progress: Progress,
    ) -> list[_Answered]:
        """Answer sets of prompts, each under an edit; `names` has those of the route's edits."""
        prompts = [prompt for part, _ in asked for prompt in self.sets[part]]
        owners = [name for part, name in asked for _ in self.sets[part]]

        def around(rows: list[int]) -> Any:
            return route([names.index(owners[row]) for row in rows])

        with _naming(owners):
            ids = self.answer(prompts, around=around, progress=progress)
            scores, kl = self._last([part for part, _ in asked], around)
        found, end = list[_Answered](), 0
        for part, _ in asked:
            rows = slice(end, end := end + len(self.sets[part]))
            score = None if scores is None else float(scores[rows].mean())
            found.append(_Answered(decoded(self.chat, ids[rows]), score, float(kl[rows].mean())))
        return found

    def _loss(self, passages: Sequence[Passage]) -> Loss:
        return cross_entropy(self.model, passages, batch_size=min(self.batch_size, 16))

    def _judge(self, condition: Condition, part: str, texts: list[str]) -> None:
        condition.completions[part] = texts
        try:
            condition.rates[part] = {
                judge.name: judged(judge, self.sets[part], texts) for judge in self.judges
            }
        except NoAnswers as error:
            raise InputError(f"{condition.name}, {part} prompts: {error}") from None

    @torch.inference_mode()
    def _last(
        self, parts: Sequence[str], around: Callable[[list[int]], Any]
    ) -> tuple[Tensor | None, Tensor]:
        """Return refusal score and KL(unmodified || this) after every prompt: float64 [prompts].

        The prompts are those of the sets in `parts`, one after the other.
        """
        prompts = [prompt for part in parts for prompt in self.sets[part]]
        first, start = dict[str, int](), 0
        for part, logits in self.logits.items():
            first[part], start = start, start + len(logits)
        before = torch.cat(list(self.logits.values()))  # of every set
        rows = [first[part] + row for part in parts for row in range(len(self.sets[part]))]
        if isinstance(self.model, ServedModel):
            with around(list(range(len(prompts)))):
                scores = self.model.refusal_scores(
                    self.chat.encode(prompts), self.tokens or (), before, rows
                )
            broken = (~scores[:, 1].isfinite()).nonzero()
            if len(broken):
                raise NoNumbers(int(broken[0]))
            return None if self.tokens is None else scores[:, 0], scores[:, 1]
        device = input_device(self.model)
        kl = torch.zeros(len(prompts), dtype=torch.float64)
        score = torch.zeros_like(kl)
        for batch in fitted(self.model, self.chat.stream(prompts, self.batch_size)):
            with around(batch.rows):
                inputs = model_inputs(batch, device)
                out = self.model(**inputs, use_cache=False, logits_to_keep=LAST)
            logits = out.logits[:, -1].to("cpu", torch.float32)
            check_numbers(logits, batch.rows)
            kl[batch.rows] = kl_divergence(before[[rows[row] for row in batch.rows]], logits)
            if self.tokens is not None:
                score[batch.rows] = refusal_score(logits, self.tokens)
        return None if self.tokens is None else score, kl
