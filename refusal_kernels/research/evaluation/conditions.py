"""One model under one edit after the other, or under many at once, and what is measured there."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.model import decoder_layers, input_device
from refusal_kernels.interventions import Intervention
from refusal_kernels.patching.handle import PatchHandle
from refusal_kernels.patching.patch import patch
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.judges import Judge
from refusal_kernels.research.evaluation.likelihood import Loss, Passage, cross_entropy
from refusal_kernels.research.evaluation.outcomes import (
    Rate,
    decoded,
    exact_match,
    generate_ids,
    judged,
)
from refusal_kernels.research.extraction.collect import batch_logits
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score


@dataclass
class Condition:
    """What was measured under one intervention.

    Attributes
    ----------
    name : str
        "unmodified", "ablated", "random 2 added", "layer 5 ablated", ...
    cosine : float or None
        Of a control: the cosine of its direction with the one that is examined.
    rates : dict of str to dict of str to Rate
        By set of prompts, then by the judge's name.
    scores : dict of str to float
        By set of prompts: the mean refusal score (log-odds, nats); empty without refusal tokens.
    kl : dict of str to float
        By set of prompts: mean KL(unmodified || this) of the next token after the prompt, nats.
    skills : dict of str to Rate
        Right answers, by task.
    losses : dict of str to Loss
        Cross-entropy, by text.
    completions : dict of str to list of str
        By set of prompts.
    """

    name: str
    cosine: float | None = None
    rates: dict[str, dict[str, Rate]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    skills: dict[str, Rate] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    completions: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rates = {
            name: {judge: rate.to_dict() for judge, rate in found.items()}
            for name, found in self.rates.items()
        }
        skills = {name: rate.to_dict() for name, rate in self.skills.items()}
        losses = {name: loss.to_dict() for name, loss in self.losses.items()}
        return {**vars(self), "rates": rates, "skills": skills, "losses": losses}


@dataclass(frozen=True)
class Dose:
    """One strength of one intervention, judged by the first judge.

    Attributes
    ----------
    strength : float
        Of the ablation, or the coefficient of the addition; 0 is no edit.
    harmful, harmless : Rate
        How many completions are a hit.
    score_harmful, score_harmless : float or None
        Mean refusal score, nats; None without refusal tokens.
    kl : float
        Mean KL(unmodified || steered) of the next token on the harmless prompts, nats.
    loss : Loss or None
        Cross-entropy on ``Evidence.dose_text``.
    """

    strength: float
    harmful: Rate
    harmless: Rate
    score_harmful: float | None
    score_harmless: float | None
    kl: float
    loss: Loss | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rates = {"harmful": self.harmful.to_dict(), "harmless": self.harmless.to_dict()}
        return {**vars(self), **rates, "loss": self.loss and self.loss.to_dict()}


class Lab:
    """One model and the sets of prompts, under one edit after the other, or many at once."""

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        sets: Mapping[str, list[str]],
        judges: Sequence[Judge],
        tokens: Sequence[int] | None,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.model, self.chat, self.sets, self.judges = model, chat, sets, judges
        self.tokens, self.max_new_tokens, self.batch_size = tokens, max_new_tokens, batch_size
        self.logits = {
            name: batch_logits(model, chat.batches(prompts, batch_size))
            for name, prompts in sets.items()
        }

    def answer(self, prompts: Sequence[str], **more: Any) -> list[list[int]]:
        """Greedy answers, as tokens."""
        return generate_ids(
            self.model, self.chat, prompts, self.max_new_tokens, self.batch_size, **more
        )

    def baseline(self, condition: Condition, progress: Progress) -> list[list[int]]:
        """Measure the unmodified model; return its answers to the harmless prompts."""
        found = {}
        for number, (name, prompts) in enumerate(self.sets.items(), 1):
            found[name] = self.answer(prompts)
            self._judge(condition, name, decoded(self.chat, found[name]))
            if self.tokens is not None:
                condition.scores[name] = float(refusal_score(self.logits[name], self.tokens).mean())
            progress(number, len(self.sets))
        return found["harmless"]

    def measure(
        self,
        handle: PatchHandle,
        programs: Mapping[str, int],
        wanted: Mapping[str, Sequence[str]],
        conditions: Mapping[str, Condition],
        progress: Progress,
    ) -> None:
        """Measure many edits together: every row of a batch takes the program of its own edit."""
        total = sum(len(self.sets[part]) * len(names) for part, names in wanted.items())
        done = 0
        for part, names in wanted.items():
            prompts, size = self.sets[part], len(self.sets[part])
            every = [prompt for _ in names for prompt in prompts]
            owners = [programs[name] for name in names for _ in prompts]

            def around(rows: list[int], owners: list[int] = owners) -> Any:
                return handle.route([owners[row] for row in rows])

            before = done
            ids = self.answer(
                every, around=around, progress=lambda now, _, b=before: progress(b + now, total)
            )
            done += len(every)
            scores, kl = self._last(part, every, around)
            for k, name in enumerate(names):
                own = slice(k * size, (k + 1) * size)
                condition = conditions[name]
                condition.kl[part] = float(kl[own].mean())
                if scores is not None:
                    condition.scores[part] = float(scores[own].mean())
                with handle.route([programs[name]]):  # a judge may look at the model itself
                    self._judge(condition, part, decoded(self.chat, ids[own]))

    def capability(
        self,
        edits: Mapping[str, Intervention | None],
        conditions: Mapping[str, Condition],
        skills: Mapping[str, Sequence[tuple[str, str]]],
        match: Callable[[str, str], bool] | None,
        passages: Mapping[str, Sequence[Passage]],
        progress: Progress,
    ) -> None:
        """Right answers and cross-entropy under each of the edits; None for no edit."""
        total, done = len(edits) * (len(skills) + len(passages)), 0
        options = {} if match is None else {"match": match}
        for name, edit in edits.items():
            with contextlib.nullcontext() if edit is None else patch(self.model, edit):
                for task, items in skills.items():
                    found = self.answer([prompt for prompt, _ in items])
                    right = [answer for _, answer in items]
                    texts = decoded(self.chat, found)
                    conditions[name].skills[task] = exact_match(texts, right, **options)
                    progress(done := done + 1, total)
                for text, scored in passages.items():
                    loss = cross_entropy(self.model, scored, batch_size=min(self.batch_size, 16))
                    conditions[name].losses[text] = loss
                    progress(done := done + 1, total)

    def dose(
        self,
        edit: Intervention,
        strengths: Sequence[float],
        passages: Sequence[Passage] | None,
        progress: Progress,
    ) -> list[Dose]:
        """Turn one edit's dial."""
        rows = []
        with patch(self.model, edit) as handle:
            for number, strength in enumerate(sorted(strengths), 1):
                handle.strength = strength
                rates, scores, kl = {}, {}, 0.0
                for part in ("harmful", "harmless"):
                    prompts = self.sets[part]
                    texts = decoded(self.chat, self.answer(prompts))
                    rates[part] = judged(self.judges[0], prompts, texts)
                    score, moved = self._last(part, prompts, None)
                    scores[part] = None if score is None else float(score.mean())
                    kl = float(moved.mean())  # that of the harmless prompts stays
                loss = None
                if passages:
                    batch_size = min(self.batch_size, 16)
                    loss = cross_entropy(self.model, passages, batch_size=batch_size)
                rows.append(
                    Dose(
                        strength, rates["harmful"], rates["harmless"],
                        scores["harmful"], scores["harmless"], kl, loss,
                    )
                )  # fmt: skip
                progress(number, len(strengths))
        return rows

    @torch.inference_mode()
    def projections(self, unit: Tensor, position: int) -> dict[str, list[list[float]]]:
        """Project the stream on a unit vector at one position, counted from the prompt's end.

        Returns
        -------
        dict of str to list
            By set of prompts: for the input of every block and the output of the last, one number
            for each prompt.
        """
        layers = decoder_layers(self.model)
        found: dict[str, list[list[float]]] = {}

        def see(number: int, stream: Tensor) -> None:
            chosen = stream[:, position].float() @ unit.to(stream.device)
            for row, value in zip(batch.rows, chosen.tolist(), strict=True):
                table[number][row] = value

        def reader(number: int) -> Callable[..., None]:
            return lambda _, args, kwargs: see(number, args[0] if args else kwargs["hidden_states"])

        hooks = [
            layer.register_forward_pre_hook(reader(number), with_kwargs=True)
            for number, layer in enumerate(layers)
        ]
        hooks.append(
            layers[-1].register_forward_hook(
                lambda _, __, out: see(len(layers), out[0] if isinstance(out, tuple) else out)
            )
        )
        try:
            for part, prompts in self.sets.items():
                table = [[0.0] * len(prompts) for _ in range(len(layers) + 1)]
                for batch in self.chat.batches(prompts, self.batch_size):
                    inputs = model_inputs(batch, input_device(self.model))
                    self.model(**inputs, use_cache=False, logits_to_keep=LAST)
                found[part] = table
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _judge(self, condition: Condition, part: str, texts: list[str]) -> None:
        condition.completions[part] = texts
        condition.rates[part] = {
            judge.name: judged(judge, self.sets[part], texts) for judge in self.judges
        }

    @torch.inference_mode()
    def _last(
        self, part: str, prompts: Sequence[str], around: Callable[[list[int]], Any] | None
    ) -> tuple[Tensor | None, Tensor]:
        """Refusal score and KL from the unmodified model at the end of every prompt: float64."""
        size, device = len(self.sets[part]), input_device(self.model)
        kl = torch.zeros(len(prompts), dtype=torch.float64)
        scores = torch.zeros_like(kl)
        for batch in self.chat.batches(prompts, self.batch_size):
            with contextlib.nullcontext() if around is None else around(batch.rows):
                inputs = model_inputs(batch, device)
                out = self.model(**inputs, use_cache=False, logits_to_keep=LAST)
            logits = out.logits[:, -1].to("cpu", torch.float32)
            rows = torch.tensor(batch.rows)
            kl[rows] = kl_divergence(self.logits[part][rows % size], logits)
            if self.tokens is not None:
                scores[rows] = refusal_score(logits, self.tokens)
        return (None if self.tokens is None else scores), kl
