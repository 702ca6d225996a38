"""Several interventions over the same prompts: refusals, and right answers to tasks."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate
from refusal_kernels.interventions import Intervention
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.judges import Judge, JudgeInputs, judged, make_judge
from refusal_kernels.research.evaluation.rates import Rate, to_json
from refusal_kernels.research.evaluation.tasks import Match, exact, exact_match
from refusal_kernels.research.steering import steering


@dataclass(frozen=True)
class Outcome:
    """The effect of one intervention.

    Attributes
    ----------
    harmful, harmless : Rate
        How many of the completions were refusals, or what else the judge counts.
    skills : dict of str to Rate
        How many answers were right, by skill.
    capability : Rate or None
        The same over all skills together; None without skills.
    completions : dict of str to list of str
        By set of prompts: "harmful", "harmless" and "skill:NAME" of every skill.
    judge : str
        The name of the judge of the first two rates.
    """

    harmful: Rate
    harmless: Rate
    skills: dict[str, Rate]
    capability: Rate | None
    completions: dict[str, list[str]]
    judge: str = "12 substrings"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dict(to_json(vars(self)))


def measure_outcomes(
    model: Any,
    tokenizer: Any,
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    interventions: Mapping[str, Intervention | None],
    skills: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    match: Match | None = None,
    judge: Judge | str = "substrings",
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Answer the same prompts under every intervention; count refusals and right answers.

    Parameters
    ----------
    model
        A transformers causal language model; it is unmodified again when this returns.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    harmful, harmless
        Test prompts, other than those that the direction was extracted from.
    interventions
        By name; None for the unmodified model.
    skills, match
        By name: pairs of a prompt and its one right answer; and when a completion is right
        (default: exact).
    judge
        Counts the refusals: a judge or its spec; by default the paper's substrings.
    max_new_tokens, batch_size
        As for `generate`.
    progress
        Called with the number of sets of prompts done, and of all.

    Returns
    -------
    dict of str to Outcome
        By the names of the interventions.

    Raises
    ------
    InputError
        If there is no intervention, or a set of prompts is empty.
    """
    skills = skills or {}
    sets = {"harmful": list(harmful), "harmless": list(harmless)}
    sets |= {f"skill:{name}": [prompt for prompt, _ in items] for name, items in skills.items()}
    if not interventions:
        raise InputError("there is no intervention; expected one at least (None: unmodified)")
    if empty := [name for name, prompts in sets.items() if not prompts]:
        raise InputError(f"the prompts of {empty[0]!r} are empty; expected one at least")

    chat, outcomes, done = ChatFormat.of(tokenizer), {}, 0
    if isinstance(judge, str):
        judge = make_judge(judge, JudgeInputs(model, chat, harmful, harmless))
    for label, intervention in interventions.items():
        completions: dict[str, list[str]] = {}
        with nullcontext() if intervention is None else steering(model, [intervention]):
            for name, prompts in sets.items():
                completions[name] = generate(model, chat, prompts, max_new_tokens, batch_size)
                done += 1
                if progress is not None:
                    progress(done, len(sets) * len(interventions))
            # the model is still patched: a judge may run it
            rates = [judged(judge, sets[name], completions[name]) for name in list(sets)[:2]]
        right = {
            name: exact_match(
                completions[f"skill:{name}"], [answer for _, answer in items], match or exact
            )
            for name, items in skills.items()
        }
        outcomes[label] = Outcome(
            harmful=rates[0],
            harmless=rates[1],
            skills=right,
            capability=Rate.pooled(right.values()) if right else None,
            completions=completions,
            judge=judge.name,
        )
    return outcomes
