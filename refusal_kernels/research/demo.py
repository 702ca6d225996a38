"""The paper's finding from beginning to end: extract, select, ablate, add, orthogonalize."""

import copy
import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import Direction
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import check_writable, write_json
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.embedded import EMBEDDED, DemoBars, DemoSize
from refusal_kernels.hf.forward import LAST, model_inputs
from refusal_kernels.hf.greedy import bare
from refusal_kernels.hf.load import load
from refusal_kernels.hf.model import decoder_layers, input_device
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.paper_hooks import paper_hooks
from refusal_kernels.patching.patch import patch
from refusal_kernels.progress import Progress, Step, single_step
from refusal_kernels.research import plots
from refusal_kernels.research.evaluation.evidence import random_directions
from refusal_kernels.research.evaluation.likelihood import Passage, cross_entropy, own_passages
from refusal_kernels.research.evaluation.outcomes import Outcome, measure_outcomes
from refusal_kernels.research.evaluation.projections import project
from refusal_kernels.research.evaluation.tasks import MATCHES, Match
from refusal_kernels.research.extraction.methods import find_candidates
from refusal_kernels.research.prompts import Source, splits_for
from refusal_kernels.research.selection.algorithm import Selection, select
from refusal_kernels.research.sources import SEED, SIZES
from refusal_kernels.timing import Method, Speed, interleaved
from refusal_kernels.weights.in_memory import check_weights, orthogonalize

Prompts = Mapping[str, Sequence[str]]  # "harmful" and "harmless"
CATEGORIES = ("harmful", "harmless")


@dataclass(frozen=True)
class DemoInputs:
    """The inputs of the demo."""

    name: str  # the model's, in the report
    model: Any
    tokenizer: Any
    train: Prompts
    validation: Prompts
    test: Prompts
    skills: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)  # empty to skip
    match: Match | None = None  # when an answer to a skill's prompt is right; None: exact
    texts: Mapping[str, Sequence[Passage]] = field(default_factory=dict)  # for the cross-entropy
    max_new_tokens: int = 64
    size: DemoSize = field(default_factory=DemoSize)
    bars: DemoBars = field(default_factory=DemoBars)
    winsorize: float | None = None  # as for `find_candidates`
    selection: Mapping[str, Any] = field(default_factory=dict)  # arguments of `select`


def read_inputs(
    model: str,
    harmful: Source | None,
    harmless: Source | None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    seed: int = SEED,
    column: str | None = None,
    selection: Mapping[str, Any] | None = None,
    **options: Any,
) -> DemoInputs:
    """Load the model, and read its prompts; those from files are cut into the three splits.

    A model that is known by name brings its tasks and texts. The options are those of `load`.
    """
    splits = splits_for(model, harmful, harmless, seed, column)
    language_model, tokenizer = load(model, device, dtype, **options)
    ChatFormat.of(tokenizer)
    inputs: dict[str, Any] = {"name": model, "selection": selection or {}}
    if embedded := EMBEDDED.get(model):
        inputs |= {
            "name": embedded.title,
            "skills": embedded.material.skills(),
            "match": MATCHES[embedded.match],
            "texts": own_passages(language_model, tokenizer, embedded.material),
            "max_new_tokens": embedded.answer_tokens,
            "size": embedded.demo,
            "bars": embedded.bars,
            "winsorize": embedded.winsorize,
        }
    size = inputs.get("size", DemoSize())
    for split in SIZES:
        most = getattr(size, split)
        inputs[split] = {name: prompts[:most] for name, prompts in splits[split].items()}
    return DemoInputs(model=language_model, tokenizer=tokenizer, **inputs)


@dataclass(frozen=True)
class DemoResult:
    """The report of the demo, ready for JSON, and samples of completions."""

    report: dict[str, Any]
    samples: list[dict[str, str]]

    @property
    def failed(self) -> list[str]:
        """The expectations that did not hold, in words."""
        return [e["claim"] for e in self.report["expectations"] if not e["holds"]]


def run(inputs: DemoInputs, out: Path, step: Step, *, rounds: int | None = None) -> DemoResult:
    """Run the whole experiment; write report, pictures, direction and samples to a folder."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}") from None
    check_writable(out)
    model, chat = inputs.model, ChatFormat.of(inputs.tokenizer)

    with single_step(step("Check that the weights can be edited")):
        check_weights(model)
    candidates = find_candidates(
        model, chat, inputs.train["harmful"], inputs.train["harmless"], model_name=inputs.name,
        winsorize=inputs.winsorize, progress=step("Extract: mean differences, train split"),
    )  # fmt: skip
    selection = select(
        model, chat, candidates, inputs.validation["harmful"], inputs.validation["harmless"],
        progress=step("Select: three scores, validation split"), **inputs.selection,
    )  # fmt: skip
    plots.plot_candidates(
        out / "candidates.png", selection.candidates, selection.place,
        thresholds=selection.thresholds,
    )  # fmt: skip
    write_json(out / "selection.json", selection.to_dict())
    direction = selection.winner
    layer, position = selection.layer, selection.position
    assert layer is not None and position is not None
    with single_step(step("Orthogonalize a copy of the weights")):
        edited = copy.deepcopy(model)
        orthogonalize(edited, direction)

    measure = functools.partial(
        measure_outcomes, tokenizer=chat, harmful=inputs.test["harmful"],
        harmless=inputs.test["harmless"], match=inputs.match,
        max_new_tokens=inputs.max_new_tokens,
    )  # fmt: skip
    edits = {
        "unmodified": None,
        "ablated": Ablate(direction),
        "added": Add(direction, block_input=layer),
    }
    skills = inputs.skills
    progress = step("Generate: unmodified, ablated, added, test split")
    outcomes = measure(model, interventions=edits, skills=skills, progress=progress)
    progress = step("Generate: orthogonalized, test split")
    written = {"orthogonalized": None}
    outcomes |= measure(edited, interventions=written, skills=skills, progress=progress)
    (control,) = random_directions(direction, 1, SEED)
    edits = {"random ablated": Ablate(control), "random added": Add(control, block_input=layer)}
    progress = step("Generate: a random direction ablated, added")
    outcomes |= measure(model, interventions=edits, progress=progress)
    with single_step(step("Measure the cross-entropy")):
        losses = {
            name: {
                "unmodified": cross_entropy(model, text).nats,
                "ablated": _ablated_loss(model, direction, text),
                "orthogonalized": cross_entropy(edited, text).nats,
            }
            for name, text in inputs.texts.items()
        }
    with single_step(step("Look at every site of the ablated stream")):
        projections = project(model, chat, inputs.test, direction.unit, position)
        residual, sites = largest_residual(model, chat, direction, inputs.test)
    speed = compare_speed(
        model, edited, chat, direction, inputs.test["harmful"], rounds or inputs.size.rounds,
        step("Compare the speed, interleaved"), batch=inputs.size.batch,
    )  # fmt: skip

    document = assemble(inputs, selection, outcomes, losses, residual, sites, speed)
    samples = collect_samples(inputs, outcomes)
    with single_step(step("Write the report and the pictures")):
        direction.save(out / "direction.safetensors")
        write_json(out / "report.json", document)
        write_json(out / "samples.json", samples)
        plots.plot_projections(out / "projections.png", projections, layer)
        plots.plot_rates(out / "refusals.png", {name: refusals(o) for name, o in outcomes.items()})
        plots.plot_speed(out / "speed.png", speed)
    return DemoResult(document, samples)


def _ablated_loss(model: Any, direction: Direction, text: Sequence[Passage]) -> float:
    with patch(model, Ablate(direction)):
        return cross_entropy(model, text).nats


def refusals(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Return the refusal rates of an intervention by category, ready for JSON."""
    return {"harmful": outcome.harmful.to_dict(), "harmless": outcome.harmless.to_dict()}


def largest_residual(
    model: Any, chat: ChatFormat, direction: Direction, prompts: Prompts
) -> tuple[float, dict[str, int]]:
    """Ablate; return the largest ``|r . h| / |h|`` at any site and token, and counts of sites."""
    unit = direction.unit.double()
    largest, seen = 0.0, set[str]()

    def see(name: str, h: Tensor) -> None:
        nonlocal largest
        rows = h[inputs["attention_mask"].bool()].double()
        residuals = (rows @ unit.to(h.device)).abs() / rows.norm(dim=-1)
        largest = max(largest, float(residuals.max()))
        seen.add(name)

    with patch(model, Ablate(direction)) as handle, handle.watch(see), torch.inference_mode():
        for category in prompts:
            for batch in chat.batches(prompts[category], 64):
                inputs = model_inputs(batch, input_device(model))
                model(**inputs, use_cache=False, logits_to_keep=LAST)
    return largest, {"claimed": len(seen), "expected": 1 + 2 * len(decoder_layers(model))}


def compare_speed(
    model: Any,
    edited: Any,
    chat: ChatFormat,
    direction: Direction,
    prompts: Sequence[str],
    rounds: int,
    progress: Progress,
    *,
    batch: int = 32,
    new_tokens: int = 24,
) -> dict[str, Speed]:
    """Compare tokens per second of greedy generation between the ways to ablate."""
    (inputs,) = chat.batches(prompts[:batch], batch)
    fed = model_inputs(inputs, input_device(model))
    fed.pop("position_ids")  # generate makes them from the mask

    def generate(name: str) -> int:
        chosen = edited if name == "orthogonalized" else model
        chosen.generate(
            **fed,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=chat.pad_id,
        )
        return len(inputs.rows) * new_tokens

    methods: dict[str, Method] = {
        "unmodified": nullcontext,
        "hooks": lambda: paper_hooks(model, direction),
        "ablated": lambda: patch(model, Ablate(direction)),
        "orthogonalized": nullcontext,
    }
    # nothing ends an answer, so all methods make the same number of tokens
    with bare(model), bare(edited):
        return interleaved(generate, methods, rounds=rounds, progress=progress)


def assemble(
    inputs: DemoInputs,
    selection: Selection,
    outcomes: Mapping[str, Outcome],
    losses: Mapping[str, Mapping[str, float]],
    residual: float,
    sites: dict[str, int],
    speed: Mapping[str, Speed],
) -> dict[str, Any]:
    """Make the report of the measurements and of what was expected of them."""
    rates = {name: refusals(outcome) for name, outcome in outcomes.items()}
    capability = {
        name: outcome.capability.value
        for name, outcome in outcomes.items()
        if outcome.capability is not None and name != "added"
    }
    harmful, harmless = (
        {name: rate[category]["value"] for name, rate in rates.items()} for category in CATEGORIES
    )
    edited = abs(harmful["orthogonalized"] - harmful["ablated"])
    bars = inputs.bars
    claims = [
        ("harmful prompts refused", harmful["unmodified"], ">=", bars.refused),
        ("harmful prompts refused, ablated", harmful["ablated"], "<=", bars.ablated),
        ("orthogonalized from ablated, harmful prompts refused", edited, "<=", bars.apart),
        ("harmless prompts refused", harmless["unmodified"], "<=", bars.harmless),
        ("harmless prompts refused, direction added", harmless["added"], ">=", bars.refused),
        ("largest |r.h| / |h| while ablated", residual, "<=", 4 * torch.finfo(torch.float32).eps),
        ("sites steered of those expected", sites["claimed"] / sites["expected"], ">=", 1.0),
    ]
    for name in ("ablated", "orthogonalized"):
        if capability:
            kept = capability[name] / max(capability["unmodified"], 1e-9)
            claims.append((f"capability kept, {name}", kept, ">=", bars.kept))
        for text, loss in losses.items():
            rise = loss[name] - loss["unmodified"]
            claims.append((f"nats by which {text} costs more, {name}", rise, "<=", 0.03))
            if bars.loss is not None:
                changed = abs(rise / loss["unmodified"])
                what = f"share by which nats on {text} change, {name}"
                claims.append((what, changed, "<=", bars.loss))
    return {
        "model": inputs.name,
        "prompts": {
            split: {category: len(prompts) for category, prompts in getattr(inputs, split).items()}
            for split in ("train", "validation", "test")
        },
        "refusal_rate": {"harmful": harmful, "harmless": harmless},
        "refusal_interval": {
            category: {name: rate[category]["interval"] for name, rate in rates.items()}
            for category in CATEGORIES
        },
        "capability": capability,
        "skills": {
            name: {skill: rate.value for skill, rate in outcome.skills.items()}
            for name, outcome in outcomes.items()
        },
        "selection": {"method": selection.winner.method, **selection.to_dict()},
        "cross_entropy": losses,
        "speed": {name: s.to_dict() for name, s in speed.items()},
        "residual": {"max_abs_score": residual},
        "sites": sites,
        "expectations": [
            {
                "claim": claim,
                "value": value,
                "bound": f"{sign} {bound:.3g}",
                "holds": value >= bound if sign == ">=" else value <= bound,
            }
            for claim, value, sign, bound in claims
        ],
        "versions": versions(),
        "device": describe_device(input_device(inputs.model)),
    }


def collect_samples(
    inputs: DemoInputs, outcomes: Mapping[str, Outcome], count: int = 3
) -> list[dict[str, str]]:
    """Return prompts with completions before and after: harmful ablated, harmless added."""
    return [
        {
            "category": category,
            "prompt": prompt,
            "before": outcomes["unmodified"].completions[category][i],
            "after": outcomes[name].completions[category][i],
            "intervention": name,
        }
        for category, name in (("harmful", "ablated"), ("harmless", "added"))
        for i, prompt in enumerate(inputs.test[category][:count])
    ]
