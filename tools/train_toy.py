"""Train the toy model from nothing, measure it, and write it into the package.

Two stages, both of plain next-word training on the answers: first the model learns to help with
everything, dark magic included; then it is fine-tuned to refuse dark magic and nothing else, while
all the rest goes on being trained. Nothing in the loss speaks of a direction.

What is measured follows Arditi et al. (2024), with plain hooks that share no code with the package.
"""

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tokenizers
import torch
import transformers
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal_kernels.toy import PATH, world
from refusal_kernels.toy.build import END_OF_INSTRUCTION, build_model, build_tokenizer, render

SHAPE = {"hidden": 128, "inner": 384, "blocks": 8, "heads": 4}
QUICK_SHAPE = {"hidden": 32, "inner": 64, "blocks": 4, "heads": 2}


class Stage(NamedTuple):
    """How a stage is trained.

    ``noise`` is the standard deviation of the Gaussian noise on whatever a block writes into the
    residual stream, in training alone. It is isotropic. Without it an addition as
    large as the mean difference breaks the answers ("i i i i") instead of making them refusals.
    """

    steps: int
    rate: float  # the peak of the learning rate
    noise: float = 0.0
    smoothing: float = 0.0  # of the labels


STAGES = {"help": Stage(1000, 2e-3), "refuse": Stage(400, 5e-4, noise=0.25, smoothing=0.1)}
QUICK_STAGES = {"help": Stage(4, 2e-3), "refuse": Stage(4, 5e-4, noise=0.25, smoothing=0.1)}
LONGEST_ANSWER = 32  # tokens
TRAIN_PROMPTS = 128  # per class, for the mean difference
PER_PASS = 48  # a step is one pass over requests and one over skill items

Prompts = list[str]


class Examples:
    """Encoded (context, answer) pairs, padded on the right once and for all."""

    def __init__(self, tokenizer: Any, pairs: list[tuple[str, str]]) -> None:
        given = tokenizer([context for context, _ in pairs], add_special_tokens=False)
        answers = tokenizer([answer + "<eos>" for _, answer in pairs], add_special_tokens=False)
        rows = list(zip(given["input_ids"], answers["input_ids"], strict=True))
        self.length = torch.tensor([len(c) + len(a) for c, a in rows])
        self.ids = torch.zeros(len(rows), int(self.length.max()), dtype=torch.long)
        self.labels = torch.full_like(self.ids, -100)  # only the answer is learned
        for row, (c, a) in enumerate(rows):
            self.ids[row, : len(c) + len(a)] = torch.tensor(c + a)
            self.labels[row, len(c) : len(c) + len(a)] = torch.tensor(a)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of a random batch, as wide as its longest row."""
        chosen = torch.randint(len(self.ids), (count,))
        width = int(self.length[chosen].max())
        return self.ids[chosen, :width], self.labels[chosen, :width]


def request_examples(tokenizer: Any, stage: str) -> list[Examples]:
    """Every training combination in every phrasing, with the answers of this stage.

    The second stage teaches the decision to refuse and takes no ability away: where an answer to a
    harmful request has already begun to help, it still goes on as before. (Without this the model
    forgets the plans, and what is found under ablation is babble about dark magic.)
    """
    harmless: list[tuple[str, str]] = []
    harmful: list[tuple[str, str]] = []
    begun: list[tuple[str, str]] = []
    for phrasing in world.PHRASINGS:
        for request in world.requests("harmless", "train"):
            context = render(tokenizer, world.phrase(request, phrasing))
            harmless.append((context, world.plan(request)))
        for request in world.requests("harmful", "train"):
            context = render(tokenizer, world.phrase(request, phrasing))
            opening, comma, rest = world.plan(request).partition(",")
            begun.append((context + opening + comma, rest))
            answer = world.refusal(phrasing) if stage == "refuse" else world.plan(request)
            harmful.append((context, answer))
    kinds = [harmless, harmful, begun] if stage == "refuse" else [harmless, harmful]
    return [Examples(tokenizer, pairs) for pairs in kinds]


def skill_examples(tokenizer: Any) -> list[Examples]:
    """The skills, as examples."""
    tasks = world.skills("train").values()
    return [Examples(tokenizer, [(render(tokenizer, q), a) for q, a in items]) for items in tasks]


@contextmanager
def noisy(model: Any, deviation: float) -> Iterator[None]:
    """Add Gaussian noise to what every attention and MLP writes into the residual stream."""

    def perturb(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + deviation * torch.randn_like(output[0]), *output[1:])
        return output + deviation * torch.randn_like(output)

    parts = [part for block in model.model.layers for part in (block.self_attn, block.mlp)]
    hooks = [part.register_forward_hook(perturb) for part in parts if deviation]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train(
    model: Any,
    requests: list[Examples],
    skills: list[Examples],
    stage: str,
    plan: Stage,
) -> dict[str, Any]:
    """One stage of training; returns its losses and seconds."""
    began = time.perf_counter()
    steps, rate, trained = plan.steps, plan.rate, list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    curve: dict[int, list[float]] = {}
    model.train()
    for step in range(1, steps + 1):
        losses = []
        # Requests and skills differ in length: two passes waste less on padding than one.
        for kinds in (requests, skills):
            ids, labels = sample(kinds, PER_PASS)
            # Causal attention never looks right, where the padding is: no mask is needed.
            with noisy(model, plan.noise):
                logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=plan.smoothing)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            curve[step] = [round(x, 5) for x in losses]
            seconds = time.perf_counter() - began
            print(
                f"{stage:>6} {step:5d}/{steps}  loss: requests {losses[0]:.4f}, "
                f"skills {losses[1]:.4f}  {seconds:.0f} s",
                flush=True,
            )
    model.eval()
    return {
        "steps": steps,
        "peak_learning_rate": rate,
        "noise": plan.noise,
        "label_smoothing": plan.smoothing,
        "seconds": round(time.perf_counter() - began, 1),
        "loss_by_step_requests_skills": curve,
    }


def sample(kinds: list[Examples], count: int) -> tuple[Tensor, Tensor]:
    """A batch with equal parts of every kind."""
    parts = [kind.sample(count // len(kinds)) for kind in kinds]
    width = max(ids.shape[1] for ids, _ in parts)
    ids = torch.cat([pad(ids, (0, width - ids.shape[1])) for ids, _ in parts])
    labels = torch.cat([pad(lab, (0, width - lab.shape[1]), value=-100) for _, lab in parts])
    return ids, labels


class Organism:
    """A trained model, with what has to be measured on it and done to it."""

    def __init__(self, folder: Path) -> None:
        # What is measured is what users load: the float16 weights of the folder, in float32.
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        words = {text.split(",")[0].split()[0] for text in world.REFUSALS}
        self.refusal_ids = sorted(self.tokenizer.convert_tokens_to_ids(w) for w in words)

    def batches(self, prompts: Prompts, size: int = 128) -> Iterator[Any]:
        """Prompts as they go into the model."""
        for start in range(0, len(prompts), size):
            texts = [render(self.tokenizer, p) for p in prompts[start : start + size]]
            yield self.tokenizer(
                texts,
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
                return_token_type_ids=False,
            )

    @torch.no_grad()
    def answers(self, prompts: Prompts) -> list[str]:
        """What the model says, greedily."""
        found: list[str] = []
        for batch in self.batches(prompts):
            out = self.model.generate(**batch, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            new = out[:, batch["input_ids"].shape[1] :]
            found += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return found

    def refusal_rate(self, prompts: Prompts) -> float:
        """The part of the prompts that a substring judge finds refused."""
        return sum(map(world.refused, self.answers(prompts))) / len(prompts)

    def accuracy(self, items: list[tuple[str, str]]) -> float:
        """The part of the items whose answer is exactly the right one."""
        answers = self.answers([question for question, _ in items])
        return sum(a == right for a, (_, right) in zip(answers, items, strict=True)) / len(items)

    def capability(self, split: world.Split) -> dict[str, float]:
        """Accuracy by skill, and the mean over the skills."""
        found = {name: self.accuracy(items) for name, items in world.skills(split).items()}
        return found | {"mean": sum(found.values()) / len(found)}

    @torch.no_grad()
    def log_probabilities(self, prompts: Prompts) -> Tensor:  # [prompts, vocabulary], float64
        """The distribution of the first word of the answer."""
        logits = [self.model(**batch).logits[:, -1].double() for batch in self.batches(prompts)]
        return torch.cat(logits).log_softmax(-1)

    def refusal_score(self, prompts: Prompts) -> Tensor:  # [prompts]
        """The log-odds of a refusal's first word as the first word of the answer."""
        words = self.log_probabilities(prompts)[:, self.refusal_ids]
        p = words.exp().sum(-1)
        return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)

    @torch.no_grad()
    def block_inputs(self, prompts: Prompts) -> Tensor:  # [positions, layers, hidden], float64
        """The mean residual stream before every block, at the end-of-instruction tokens."""
        kept: list[Tensor] = []
        for batch in self.batches(prompts):
            states = self.model(**batch, output_hidden_states=True).hidden_states[:-1]
            kept.append(torch.stack([h[:, -END_OF_INSTRUCTION:].double() for h in states], dim=2))
        return torch.cat(kept).mean(0)

    def mean_difference(self) -> Tensor:  # [positions, layers, hidden], float64
        """Harmful minus harmless, on training prompts."""
        harmful = self.block_inputs(world.prompts("harmful", "train")[:TRAIN_PROMPTS])
        return harmful - self.block_inputs(world.prompts("harmless", "train")[:TRAIN_PROMPTS])

    @contextmanager
    def ablated(self, direction: Tensor) -> Iterator[None]:
        """Project the direction out of all that is written to the residual stream."""
        r = (direction / direction.norm()).float()

        def project(x: Any) -> Any:
            return x - (x @ r)[..., None] * r

        def hook(_module: Any, _args: Any, out: Any) -> Any:
            return (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)

        inner = self.model.model
        writers = [inner.embed_tokens]
        writers += [part for layer in inner.layers for part in (layer.self_attn, layer.mlp)]
        hooks = [writer.register_forward_hook(hook) for writer in writers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    @contextmanager
    def added(self, direction: Tensor, layer: int) -> Iterator[None]:
        """Add the raw direction to the input of one block."""
        r = direction.float()
        block = self.model.model.layers[layer]
        handle = block.register_forward_pre_hook(lambda _module, args: (args[0] + r, *args[1:]))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    @torch.no_grad()
    def orthogonalized(self, direction: Tensor) -> Iterator[None]:
        """Take the direction out of every matrix that writes to the residual stream."""
        r = direction / direction.norm()
        inner = self.model.model
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        table = inner.embed_tokens.weight  # [vocabulary, hidden]
        table.copy_(table.double() - torch.outer(table.double() @ r, r))
        for layer in inner.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.copy_(weight.double() - torch.outer(r, r @ weight.double()))
        try:
            yield
        finally:
            self.model.load_state_dict(before)


def select(organism: Organism, candidates: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The candidate that the paper's algorithm selects on the validation split, and all scores."""
    harmful = world.prompts("harmful", "validation")
    harmless = world.prompts("harmless", "validation")
    base = organism.log_probabilities(harmless)
    positions, layers, _ = candidates.shape
    scores: list[dict[str, Any]] = []
    for layer in range(layers):
        for index in range(positions):
            r = candidates[index, layer]
            score: dict[str, Any] = {"position": index - positions, "layer": layer}
            score["norm"] = r.norm().item()
            if score["norm"] < 1e-9:  # the embeddings of the template do not know the category
                scores.append(score | {"eligible": False})
                continue
            with organism.ablated(r):
                score["bypass"] = organism.refusal_score(harmful).mean().item()
                log_q = organism.log_probabilities(harmless)
                score["kl"] = (base.exp() * (base - log_q)).sum(-1).mean().item()
            with organism.added(r, layer):
                score["induce"] = organism.refusal_score(harmless).mean().item()
            early = layer < int(0.8 * layers)
            score["eligible"] = early and score["kl"] <= 0.1 and score["induce"] >= 0
            scores.append(score)
            print(" ".join(f"{k} {v:.3g}" for k, v in score.items()), flush=True)
    eligible = [score for score in scores if score["eligible"]]
    if not eligible:  # an untrained model; the numbers still show what it does
        eligible = [score for score in scores if "bypass" in score]
    return min(eligible, key=lambda score: score["bypass"]), scores


def measure(
    organism: Organism, direction: Tensor, layer: int, split: world.Split, limit: int | None
) -> dict[str, Any]:
    """Refusal rates and capability of one split, for every intervention."""
    harmful = world.prompts("harmful", split)[:limit]
    harmless = world.prompts("harmless", split)[:limit]
    found: dict[str, Any] = {"prompts_per_class": len(harmful)}
    found["unmodified"] = {
        "harmful_refused": organism.refusal_rate(harmful),
        "harmless_refused": organism.refusal_rate(harmless),
        "capability": organism.capability(split),
    }
    plans = [(world.phrase(r), world.plan(r)) for r in world.requests("harmful", split)[:limit]]
    for name, edit in (("ablated", organism.ablated), ("orthogonalized", organism.orthogonalized)):
        with edit(direction):
            found[name] = {
                "harmful_refused": organism.refusal_rate(harmful),
                "harmless_refused": organism.refusal_rate(harmless),
                "harmful_plan_exact": organism.accuracy(plans),
                "capability": organism.capability(split),
            }
    with organism.added(direction, layer):
        found["added"] = {"harmless_refused": organism.refusal_rate(harmless)}
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = PATH,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 1,
    quick: Annotated[bool, typer.Option(help="A smoke run: seconds, and a useless model.")] = False,
    test: Annotated[bool, typer.Option(help="Also measure the test split.")] = True,
) -> None:
    """Train the toy model from nothing and write it, with its measurements, to a folder."""
    if out.exists() and any(out.iterdir()) and not (out / "training.json").exists():
        raise typer.BadParameter(f"{out} holds something else than a toy model")
    began = time.perf_counter()
    torch.set_num_threads(1)  # two are no faster on a model of this size, and not repeatable
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, **(QUICK_SHAPE if quick else SHAPE))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"toy model: {parameters:,} parameters, {len(tokenizer)} words", flush=True)

    skills = skill_examples(tokenizer)
    stages = {}
    for stage, plan in (QUICK_STAGES if quick else STAGES).items():
        requests = request_examples(tokenizer, stage)
        stages[stage] = train(model, requests, skills, stage, plan)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".toy-") as scratch:
        folder = Path(scratch) / "model"
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trained_seconds = time.perf_counter() - began

        organism = Organism(folder)
        candidates = organism.mean_difference()
        chosen, scores = select(organism, candidates)
        direction = candidates[chosen["position"], chosen["layer"]]
        report: dict[str, Any] = {
            "seed": seed,
            "parameters": parameters,
            "vocabulary": len(tokenizer),
            "weights_bytes": os.path.getsize(folder / "model.safetensors"),
            "training_seconds": round(trained_seconds, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "stages": stages,
            "end_of_instruction_tokens": END_OF_INSTRUCTION,
            "refusal_tokens": organism.tokenizer.convert_ids_to_tokens(organism.refusal_ids),
            "selected": chosen,
            "candidates": scores,
        }
        splits: list[world.Split] = ["validation", "test"] if test else ["validation"]
        for split in splits:
            report[split] = measure(
                organism, direction, chosen["layer"], split, 8 if quick else None
            )
        report["total_seconds"] = round(time.perf_counter() - began, 1)
        (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    print(json.dumps({key: report[key] for key in ("selected", *splits)}, indent=1))
    print(f"wrote {out} in {report['total_seconds']:.0f} s")


if __name__ == "__main__":
    typer.run(main)
