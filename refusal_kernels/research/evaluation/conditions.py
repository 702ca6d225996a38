"""The conditions of an evaluation, and the runner that measures a model under each of them."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.checks import NoNumbers, check_numbers
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.generate import decoded, generate_ids
from refusal_kernels.hf.logits import last_logits
from refusal_kernels.hf.model import input_device
from refusal_kernels.hf.padding import fitted
from refusal_kernels.interventions import Intervention
from refusal_kernels.patching.handle import PatchHandle
from refusal_kernels.patching.patch import patch
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.judges import Judge, judged
from refusal_kernels.research.evaluation.likelihood import Loss, Passage, cross_entropy
from refusal_kernels.research.evaluation.rates import Rate, to_json
from refusal_kernels.research.evaluation.tasks import Match, exact, exact_match
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score

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


@contextlib.contextmanager
def _naming(names: Sequence[str], each: int) -> Iterator[None]:
    """Say under which edit a model gave no numbers; each edit has so many of the rows."""
    try:
        yield
    except NoNumbers as error:
        raise InputError(f"{names[error.row // each]}: {error}") from None


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
        handle: PatchHandle,
        programs: Mapping[str, int],
        wanted: Mapping[str, Sequence[str]],
        conditions: Mapping[str, Condition],
        progress: Progress,
    ) -> None:
        """Measure many edits together: every row of a batch is routed to the program of its edit.

        `programs` has the number of each edit's program in the patch, and `wanted` the edits to
        measure on each set of prompts. The results go to `conditions`.
        """
        total = sum(len(self.sets[part]) * len(names) for part, names in wanted.items())
        done = 0
        for part, names in wanted.items():
            prompts, size = self.sets[part], len(self.sets[part])
            every = [prompt for _ in names for prompt in prompts]
            owners = [programs[name] for name in names for _ in prompts]

            def around(rows: list[int], owners: list[int] = owners) -> Any:
                return handle.route([owners[row] for row in rows])

            before = done
            with _naming(names, size):
                ids = self.answer(
                    every, around=around, progress=lambda now, _, b=before: progress(b + now, total)
                )
                done += len(every)
                scores, kl = self._last(part, every, around)
            for k, name in enumerate(names):
                rows = slice(k * size, (k + 1) * size)
                condition = conditions[name]
                condition.kl[part] = float(kl[rows].mean())
                if scores is not None:
                    condition.refusal_scores[part] = float(scores[rows].mean())
                with handle.route([programs[name]]):  # a judge may run the model
                    self._judge(condition, part, decoded(self.chat, ids[rows]))

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
        total, done = len(edits) * (len(skills) + len(passages)), 0
        for name, edit in edits.items():
            steered = contextlib.nullcontext() if edit is None else patch(self.model, edit)
            with steered, _naming([name], sys.maxsize):
                for task, items in skills.items():
                    texts = decoded(self.chat, self.answer([prompt for prompt, _ in items]))
                    right = exact_match(texts, [answer for _, answer in items], match or exact)
                    conditions[name].skills[task] = right
                    progress(done := done + 1, total)
                for text, scored in passages.items():
                    conditions[name].losses[text] = self._loss(scored)
                    progress(done := done + 1, total)

    def dose(
        self,
        edit: Intervention,
        strengths: Sequence[float],
        passages: Sequence[Passage] | None,
        progress: Progress,
    ) -> list[DosePoint]:
        """Measure one edit at several strengths, in ascending order."""
        points = []
        with patch(self.model, edit) as handle:
            for number, strength in enumerate(sorted(strengths), 1):
                handle.strength = strength
                rates, scores, kl = {}, {}, 0.0
                with _naming([f"{type(edit).__name__} at strength {strength:g}"], sys.maxsize):
                    for part in ("harmful", "harmless"):
                        prompts = self.sets[part]
                        texts = decoded(self.chat, self.answer(prompts))
                        rates[part] = judged(self.judges[0], prompts, texts)
                        score, moved = self._last(part, prompts, None)
                        if score is not None:
                            scores[part] = float(score.mean())
                        kl = float(moved.mean())  # kept: that of the harmless prompts, the last
                    loss = self._loss(passages) if passages else None
                points.append(DosePoint(strength, **rates, refusal_scores=scores, kl=kl, loss=loss))
                progress(number, len(strengths))
        return points

    def _loss(self, passages: Sequence[Passage]) -> Loss:
        return cross_entropy(self.model, passages, batch_size=min(self.batch_size, 16))

    def _judge(self, condition: Condition, part: str, texts: list[str]) -> None:
        condition.completions[part] = texts
        condition.rates[part] = {
            judge.name: judged(judge, self.sets[part], texts) for judge in self.judges
        }

    @torch.inference_mode()
    def _last(
        self, part: str, prompts: Sequence[str], around: Callable[[list[int]], Any] | None
    ) -> tuple[Tensor | None, Tensor]:
        """Return refusal score and KL(unmodified || this) after every prompt: float64 [prompts]."""
        size, device = len(self.sets[part]), input_device(self.model)
        kl = torch.zeros(len(prompts), dtype=torch.float64)
        scores = torch.zeros_like(kl)
        for batch in fitted(self.model, self.chat.stream(prompts, self.batch_size)):
            with contextlib.nullcontext() if around is None else around(batch.rows):
                inputs = model_inputs(batch, device)
                out = self.model(**inputs, use_cache=False, logits_to_keep=LAST)
            logits = out.logits[:, -1].to("cpu", torch.float32)
            check_numbers(logits, batch.rows)
            rows = torch.tensor(batch.rows)
            kl[rows] = kl_divergence(self.logits[part][rows % size], logits)
            if self.tokens is not None:
                scores[rows] = refusal_score(logits, self.tokens)
        return (None if self.tokens is None else scores), kl
