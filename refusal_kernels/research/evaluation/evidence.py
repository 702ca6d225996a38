"""Evidence about one direction: is it necessary, sufficient and specific, and what does it cost.

The questions are those of Arditi et al. 2024 (arXiv 2406.11717), sections 3 and 4.3. Random
directions of the same norm and the directions of other layers are the controls.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.direction import Candidates, Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.model import input_device, layer_count
from refusal_kernels.interventions import Ablate, Add, Intervention
from refusal_kernels.progress import Step, no_step, single_step
from refusal_kernels.research.evaluation.conditions import Condition, ConditionRunner, DosePoint
from refusal_kernels.research.evaluation.judges import Judge, JudgeInputs, make_judge
from refusal_kernels.research.evaluation.likelihood import Passage, answers
from refusal_kernels.research.evaluation.projections import project
from refusal_kernels.research.evaluation.rates import to_json
from refusal_kernels.research.evaluation.tasks import Match
from refusal_kernels.research.selection.scoring import TokenSpec, find_refusal_tokens, given_tokens

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
UNMODIFIED, ABLATED, ADDED, SUBTRACTED = "unmodified", "ablated", "added", "subtracted"
MAIN = (UNMODIFIED, ABLATED, ADDED, SUBTRACTED)
ON_DISTRIBUTION = "own completions"


@dataclass
class Evidence:
    """All measurements of one direction.

    Attributes
    ----------
    direction : dict
        Its norm, layer (where it was added), position, hidden size, model and method.
    judges : list of dict
        "name" and "counts" (what a hit is) of every judge; the first one judges the dose.
    prompts : dict of str to list of str
        The sets: "harmful", "harmless" and the extra ones.
    refusal_tokens : list of int or None
        The tokens of the refusal scores; None if the model has none.
    conditions : dict of str to Condition
        By name: the four of `MAIN`, then the controls.
    dose : dict of str to list of DosePoint
        "ablation" and "addition", by strength.
    dose_text : str or None
        The text whose cross-entropy the dose shows.
    projections : dict of str to list
        By set of prompts: the unmodified stream projected on the unit direction, at the position
        where the direction was read; for the input of every block and the output of the last, one
        number for each prompt.
    settings : dict
        Seed, lengths, batch size, system prompt (None: the template's) and answer prefix.
    notes : list of str
        What could not be measured, and why.
    """

    direction: dict[str, Any]
    judges: list[dict[str, str]]
    prompts: dict[str, list[str]]
    refusal_tokens: list[int] | None
    conditions: dict[str, Condition]
    dose: dict[str, list[DosePoint]]
    dose_text: str | None
    projections: dict[str, list[list[float]]]
    settings: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON and for the page (`html.render`)."""
        return dict(to_json(vars(self)))


def random_directions(direction: Direction, count: int, seed: int) -> list[Direction]:
    """Make isotropic random directions of the same norm, the same on every machine."""
    directions = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        vector = torch.randn(direction.hidden, dtype=torch.float64, generator=generator)
        vector *= direction.norm / float(vector.norm())
        directions.append(Direction(vector.float(), layer=direction.layer, method="random"))
    return directions


def evaluate(
    model: Any,
    tokenizer: Any,
    direction: Direction,
    *,
    harmful: Sequence[str],
    harmless: Sequence[str],
    extra: Mapping[str, Sequence[str]] | None = None,
    judges: Sequence[Judge | str] | str = "substrings",
    candidates: Candidates | None = None,
    refusal_tokens: TokenSpec = None,
    block_input: int | None = None,
    skills: Mapping[str, Sequence[tuple[str, str]]] | None = None,
    match: Match | None = None,
    texts: Mapping[str, Sequence[Passage]] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    random_controls: int = 3,
    layer_controls: int = 8,
    seed: int = 0,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    step: Step = no_step,
) -> Evidence:
    """Measure necessity, sufficiency, specificity, dose and capability of one direction.

    ``refusal-kernels evaluate`` runs this function.

    Parameters
    ----------
    model
        A transformers causal language model, unmodified again when this returns; or an `Engine`
        that reads a position.
    tokenizer
        Its tokenizer, or a `ChatFormat`.
    direction
        The direction that is examined.
    harmful, harmless
        Test prompts, other than those that the direction was extracted and selected with.
    extra
        More sets by name, such as harmless prompts that look harmful (XSTest).
    judges
        Of the completions: judges, or their specs
        (`refusal_kernels.research.evaluation.judges.make_judge`). The first judges the dose.
    candidates
        With them the directions of other layers, read at the same position, are controls, each with
        its own norm at its own layer. They may leave the last layers out.
    refusal_tokens
        The tokens of the refusal scores, as `select` takes them; by default found on the prompts.
        If none are found, no refusal scores are measured, and a note says why.
    block_input
        The block at whose input the raw direction is added; by default the direction's layer.
    skills, match
        Tasks with one right answer, by name, and when a completion is right (default: exact).
    texts
        Passages by name (``windows`` and ``answers`` of
        `refusal_kernels.research.evaluation.likelihood`). The model's own completions of the
        harmless prompts are always added.
    strengths
        Of the dose; empty for none.
    random_controls, layer_controls
        How many of each; the layers are evenly spaced.
    seed
        Of the random directions.
    max_new_tokens, batch_size
        As for `refusal_kernels.generate`.
    step
        Told of each part of the work and of its progress.

    Returns
    -------
    Evidence
        Every rate with its judge.

    Raises
    ------
    InputError
        If a set of prompts is empty, the layer is not known, a judge cannot be made, or the
        candidates do not fit.
    """
    chat = ChatFormat.of(tokenizer)
    sets = {"harmful": list(harmful), "harmless": list(harmless)}
    sets |= {name: list(prompts) for name, prompts in (extra or {}).items()}
    if empty := [name for name, prompts in sets.items() if not prompts]:
        raise InputError(f"the prompts of {empty[0]!r} are empty; expected one at least")
    layer = direction.layer if block_input is None else block_input
    if layer is None:
        raise InputError("the direction does not say at which layer to add; expected block_input")
    controls = _controls(model, direction, candidates, layer, random_controls, layer_controls, seed)
    tokens = given_tokens(model, chat, refusal_tokens)
    inputs = JudgeInputs(
        model, chat, sets["harmful"], sets["harmless"], tokens, input_device(model)
    )
    judges = [judges] if isinstance(judges, str) else judges
    chosen = [make_judge(judge, inputs) if isinstance(judge, str) else judge for judge in judges]
    if not chosen:
        raise InputError("there is no judge; expected one at least")
    if twice := [name for name, n in Counter(judge.name for judge in chosen).items() if n > 1]:
        raise InputError(f"two judges have the name '{twice[0]}'; expected different ones")
    notes: list[str] = []
    if tokens is None:
        try:
            with single_step(step("Find the refusal tokens")):
                classes = sets["harmful"], sets["harmless"]
                tokens = find_refusal_tokens(model, chat, *classes, batch_size)
        except InputError as error:  # the model begins its answers alike on both sets
            notes.append(f"refusal scores are not measured: {error}")
    runner = ConditionRunner(model, chat, sets, chosen, tokens, max_new_tokens, batch_size)

    edits: dict[str, Intervention] = {
        ABLATED: Ablate(direction),
        ADDED: Add(direction, block_input=layer),
        SUBTRACTED: Add(direction, coefficient=-1.0, block_input=layer),
    }
    conditions = {name: Condition(name) for name in MAIN}
    for name, (control, edit) in controls.items():
        edits[name] = edit
        conditions[name] = Condition(name, float(control.unit @ direction.unit))
    # a control is measured only on the prompts that its edit is meant for
    asked = {"harmful": f" {ABLATED}", "harmless": f" {ADDED}"}
    wanted = {
        part: [*MAIN[1:], *(name for name in controls if name.endswith(asked.get(part, "-")))]
        for part in sets
    }
    position = -1 if direction.position is None else direction.position
    with single_step(step("Projections")):
        projections = project(model, chat, sets, direction.unit, position, batch_size)
    completions = runner.unmodified(conditions[UNMODIFIED], step("Unmodified"))
    runner.measure(edits, wanted, conditions, step("Ablated, added, controls"))

    passages = dict(texts or {})
    pairs = [(p, ids) for p, ids in zip(sets["harmless"], completions, strict=True) if ids]
    if pairs:
        passages[ON_DISTRIBUTION] = answers(chat, pairs)
    main = {name: edits.get(name) for name in MAIN}
    runner.capability(main, conditions, skills or {}, match, passages, step("Capability"))

    dose_text = next(iter(passages), None)
    dose: dict[str, list[DosePoint]] = {}
    for kind, name in (("ablation", ABLATED), ("addition", ADDED)) if strengths else ():
        scored = passages[dose_text] if dose_text else None
        points = runner.dose(edits[name], strengths, scored, step(f"Dose of the {kind}"))
        if points:  # else a note says why
            dose[kind] = points
    return Evidence(
        direction={
            "norm": direction.norm, "layer": layer, "position": direction.position,
            "hidden": direction.hidden, "model": direction.model, "method": direction.method,
        },
        judges=[{"name": judge.name, "counts": judge.counts} for judge in chosen],
        prompts=sets,
        refusal_tokens=tokens,
        conditions=conditions,
        dose=dose,
        dose_text=dose_text,
        projections=projections,
        settings={
            "seed": seed, "max_new_tokens": max_new_tokens, "batch_size": batch_size,
            "random_controls": random_controls, "system": chat.system, "thinking": chat.thinking,
            "date": chat.date,
            "answer_prefix": chat.answer_prefix or None,
        },
        notes=notes + runner.notes,
    )  # fmt: skip


def _controls(
    model: Any,
    direction: Direction,
    candidates: Candidates | None,
    layer: int,
    random: int,
    others: int,
    seed: int,
) -> dict[str, tuple[Direction, Intervention]]:
    """Return the controls by name: their direction, and the edit."""
    chosen = {
        f"random {i}": (control, layer)
        for i, control in enumerate(random_directions(direction, random, seed), 1)
    }
    if candidates is not None and others > 0:
        layers = layer_count(model)
        position = -1 if direction.position is None else direction.position
        if len(candidates.layers) > layers or candidates.hidden != direction.hidden:
            raise InputError(
                f"candidates {list(candidates.vectors.shape)}; "
                f"expected [position, {layers} layers or fewer, {direction.hidden}]"
            )
        if position not in candidates.positions:
            raise InputError(
                f"the direction was read at position {position}; the candidates have "
                f"{len(candidates.positions)} positions"
            )
        rows = candidates.vectors[position]
        largest = float(rows.norm(dim=-1).nan_to_num(0).max())
        usable = [
            i for i, row in enumerate(rows)
            if i != layer and row.isfinite().all() and float(row.norm()) > 1e-6 * largest
        ]  # fmt: skip
        every = torch.linspace(0, len(usable) - 1, min(others, len(usable))).round().int().tolist()
        for i in (usable[k] for k in every):
            chosen[f"layer {i}"] = Direction(rows[i], layer=i, position=position), i
    return {
        f"{name} {what}": (control, edit)
        for name, (control, at) in chosen.items()
        for what, edit in ((ABLATED, Ablate(control)), (ADDED, Add(control, block_input=at)))
    }
