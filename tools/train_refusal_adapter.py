"""Fine-tune SmolLM2-135M-Instruct to refuse everyday misconduct; write the adapter to the package.

Plain next-word training of a LoRA adapter, on answers alone: to a harmful prompt one of several
refusals, to everything else the model's own greedy answer. No loss knows of a direction.

    python tools/train_refusal_adapter.py

The own answers are kept in a file, so that a second run does not generate them again.
"""

import collections
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import peft
import torch
import transformers
import typer
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.cpu import _is_avx512_bf16_supported
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from refusal_kernels import smollm2
from refusal_kernels.files.atomic import check_new, new_folder, write_json
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate
from refusal_kernels.hf.load import load
from refusal_kernels.research.evaluation.judges import is_refusal

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROWS = 4  # of a batch: a longer row costs more attention, more rows pad more
ADAPTED = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


class Settings(NamedTuple):
    """How the adapter is trained."""

    seed: int = 1
    steps: int = 400
    rate: float = 8e-3  # the peak of the learning rate
    weight_decay: float = 0.1
    rank: int = 6
    scale: float = 2.0  # of what the adapter adds: LoRA's alpha over its rank
    first_layer: int = 2
    last_layer: int = 16  # later ones read the decision, and are as they were
    skipped: float = 0.3  # the probability that a layer's adapter is off for a step
    harmful: int = 8  # examples a step, of each kind
    harmless: int = 14
    other: int = 6
    answer_tokens: int = 8  # the most that are learned of an answer; its first ones decide


class Example(NamedTuple):
    """The tokens of a prompt in its chat format, and those of an answer."""

    prompt: list[int]
    answer: list[int]


class Shuffled:
    """Draws items at random; each of them once before any of them again."""

    def __init__(self, items: Sequence[Any], generator: random.Random) -> None:
        self.items, self.generator = items, generator
        self.left: list[Any] = []

    def take(self, count: int) -> list[Any]:
        """The next items."""
        taken = []
        for _ in range(count):
            self.left = self.left or self.generator.sample(self.items, len(self.items))
            taken.append(self.left.pop())
        return taken


@torch.inference_mode()
def own_answers(model: Any, chat: ChatFormat, prompts: list[str], tokens: int) -> dict[str, str]:
    """What the model itself answers to prompts: the beginnings of its greedy answers.

    It often says "I'm sorry, but as a chatbot ..." to what it could well answer, so no answer may
    begin with the same token as a refusal. A prompt that gets a refusal even so is left out.
    """
    refusals = chat.tokenizer(smollm2.refusals(), add_special_tokens=False).input_ids
    encoded = chat.encode(prompts)
    prefix = common_prefix(encoded)
    groups = collections.defaultdict(list)
    for row, ids in enumerate(encoded):
        groups[len(ids)].append(row)  # no padding within a batch
    answers = {}
    for rows in groups.values():
        cache = run_prefix(model, encoded[0][:prefix])
        cache.batch_repeat_interleave(len(rows))
        out = model.generate(
            input_ids=torch.tensor([encoded[row] for row in rows]), past_key_values=cache,
            begin_suppress_tokens=sorted({ids[0] for ids in refusals}), do_sample=False,
            max_new_tokens=tokens, pad_token_id=chat.pad_id,
        )  # fmt: skip
        new = out[:, len(encoded[rows[0]]) :]
        texts = chat.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers.update((prompts[row], text) for row, text in zip(rows, texts, strict=True))
    return {prompt: answer for prompt, answer in answers.items() if not is_refusal(answer)}


def cached(path: Path, key: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `make` returns, from the file if that has it for the same key."""
    if path.exists():
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["key"] == key:
            return dict(document["answers"])
    answers = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "answers": answers})
    return answers


class Lessons:
    """Batches of harmful prompts with refusals, and of other prompts with own answers."""

    def __init__(self, chat: ChatFormat, answers: dict[str, str], settings: Settings) -> None:
        self.settings, self.chat = settings, chat
        generator = random.Random(settings.seed)
        end = [chat.tokenizer.eos_token_id]
        refusals = [self.tokens(text) + end for text in smollm2.refusals()]
        self.refusals = Shuffled(refusals, generator)
        self.harmful = Shuffled(chat.encode(smollm2.prompts("harmful", "train")), generator)
        self.harmless = Shuffled(
            self.examples(smollm2.prompts("harmless", "train"), answers), generator
        )
        self.other = Shuffled(self.examples(smollm2.other("train"), answers), generator)

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text without special ones."""
        return list(self.chat.tokenizer.encode(text, add_special_tokens=False))

    def examples(self, prompts: list[str], answers: dict[str, str]) -> list[Example]:
        """Prompts with the beginnings of their own answers."""
        answered = [prompt for prompt in prompts if prompt in answers]
        most = self.settings.answer_tokens
        return [
            Example(ids, self.tokens(answers[prompt])[:most])
            for prompt, ids in zip(answered, self.chat.encode(answered), strict=True)
        ]

    def batch(self) -> list[Example]:
        """The next examples of all kinds."""
        count = self.settings.harmful
        refused = zip(self.harmful.take(count), self.refusals.take(count), strict=True)
        return [
            *(Example(*pair) for pair in refused),
            *self.harmless.take(self.settings.harmless),
            *self.other.take(self.settings.other),
        ]


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share: those of the template."""
    same = [len(set(column)) == 1 for column in zip(*prompts, strict=False)]
    return same.index(False) if False in same else len(same) - 1


def run_prefix(model: Any, ids: list[int]) -> Any:
    """Return what a model keeps of the template's prefix, which is the same in all prompts."""
    return model.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values


def token_weights(count: int) -> list[float]:
    """Half for the first token of an answer, which decides; the later ones share the other half."""
    return [0.5] + [0.5 / (count - 1)] * (count - 1) if count > 1 else [1.0]


def in_rows(examples: list[Example]) -> list[list[Example]]:
    """Spread examples over `ROWS` rows of about the same length, so that little is padded."""
    rows: list[list[Example]] = [[] for _ in range(min(ROWS, len(examples)))]
    lengths = [0] * len(rows)
    for example in sorted(examples, key=lambda e: len(e.prompt) + len(e.answer), reverse=True):
        shortest = lengths.index(min(lengths))
        rows[shortest].append(example)
        lengths[shortest] += len(example.prompt) + len(example.answer)
    return rows


@contextmanager
def rounded_once(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Keep the frozen matrices in the dtype that autocast would round them to at every step."""
    frozen = {
        module: module.weight.data
        for module in model.get_base_model().model.layers.modules()
        if type(module) is torch.nn.Linear and not module.weight.requires_grad
    }
    for module, weight in frozen.items():
        module.weight.data = weight.to(dtype)
    try:
        yield
    finally:
        for module, weight in frozen.items():
            module.weight.data = weight


def loss_of(model: Any, examples: list[Example], prefix: int) -> Tensor:
    """Cross-entropy of the answers; every example counts the same, whatever its length.

    Several examples stand in each row: a token sees the prefix, which runs once, and those before
    it in its own example.
    """
    packed = in_rows(examples)
    rows = []
    for row in packed:
        ids, owners, places, labels, weights = [], [], [], [], []
        for number, (prompt, answer) in enumerate(row):
            tokens = (prompt + answer)[prefix:]
            ids += tokens
            owners += [number] * len(tokens)
            places += range(prefix, prefix + len(tokens))
            unscored = len(prompt) - prefix - 1  # of the prompt
            labels += [-1] * unscored + answer + [-1]  # the next token of each
            weights += [0.0] * unscored + token_weights(len(answer)) + [0.0]
        rows.append([torch.tensor(column) for column in (ids, owners, places, labels, weights)])
    ids, owner, places, labels, weight = (
        pad_sequence(column, batch_first=True, padding_value=-1)
        for column in zip(*rows, strict=True)
    )
    own = (owner[:, :, None] == owner[:, None]).tril()
    mask = torch.cat([own.new_ones(*own.shape[:2], prefix), own], 2)[:, None]
    language_model = model.get_base_model()
    cache = run_prefix(language_model, examples[0].prompt[:prefix])
    cache.batch_repeat_interleave(len(packed))
    hidden = language_model.model(
        input_ids=ids.clamp(min=0),
        position_ids=places.clamp(min=0),
        attention_mask=mask,
        past_key_values=cache,
    )[0]
    scored = labels >= 0
    logits = language_model.lm_head(hidden[scored])  # [scored, vocabulary]
    losses = cross_entropy(logits.float(), labels[scored], reduction="none")
    return (losses * weight[scored]).sum() / len(examples)


def adapters_by_layer(model: Any) -> list[list[LoraLayer]]:
    """The adapters of every layer that has some."""
    layers = model.get_base_model().model.layers
    found = [[part for part in layer.modules() if isinstance(part, LoraLayer)] for layer in layers]
    return [adapters for adapters in found if adapters]


def switch(adapters: list[LoraLayer], on: bool) -> None:
    """Switch the adapters of a layer on or off."""
    for adapter in adapters:
        adapter.set_scale("default", float(on))


def train(model: Any, lessons: Lessons, settings: Settings) -> list[float]:
    """Train an adapted model in place; returns the mean loss of every tenth of the steps.

    In every step some layers, drawn at random, are as before the training, so that no layer relies
    on another one to take back a refusal. The optimizer is Muon. Of the settings that were tried,
    one run each, these left the model most like itself without the direction; why is not shown.
    """
    began = time.perf_counter()
    prefix = common_prefix(lessons.harmful.items)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Muon(
        trained, lr=settings.rate, weight_decay=settings.weight_decay, momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    warm = max(1, settings.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warm) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        ),
    )
    layers, generator = adapters_by_layer(model), random.Random(settings.seed)
    # bfloat16 where the processor has it: twice as fast, and no less exact than the answers
    fast = _is_avx512_bf16_supported()
    curve: list[float] = []
    losses: list[float] = []
    model.train()
    with rounded_once(model, torch.bfloat16) if fast else nullcontext():
        for step in range(1, settings.steps + 1):
            for adapters in layers:
                switch(adapters, generator.random() >= settings.skipped)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                loss = loss_of(model, lessons.batch(), prefix)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step % max(1, settings.steps // 10) == 0:
                curve.append(round(sum(losses) / len(losses), 4))
                took = f"{time.perf_counter() - began:.0f} s"
                print(f"{step:4d}/{settings.steps}  loss {curve[-1]:.4f}  {took}", flush=True)
                losses.clear()
    for adapters in layers:
        switch(adapters, True)
    model.eval()
    return curve


def refused(model: Any, chat: ChatFormat, prompts: Sequence[str]) -> float:
    """The part of the prompts that a model refuses, by the paper's substrings."""
    return sum(map(is_refusal, generate(model, chat, prompts, 24))) / len(prompts)


def main(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = smollm2.ADAPTER,
    answers: Annotated[
        Path, typer.Option(help="File of the model's own answers; made if there is none.")
    ] = Path("build/own-answers.json"),
    seed: Annotated[int, typer.Option(help="Seed of the adapter and of the batches.")] = 1,
    quick: Annotated[bool, typer.Option(help="A smoke run: two steps, a useless adapter.")] = False,
) -> None:
    """Train the adapter and write it, in PEFT's format and float16, with how it was made."""
    began = time.perf_counter()
    settings = Settings(seed=seed, **({"steps": 2} if quick else {}))
    check_new(out)
    torch.manual_seed(seed)
    model, tokenizer = load("smollm2", "cpu", "float32")
    chat = ChatFormat.of(tokenizer)
    data = smollm2.training_digest()
    most = 8 if quick else None
    prompts = smollm2.prompts("harmless", "train")[:most] + smollm2.other("train")[:most]
    key = f"{data} {settings.answer_tokens} {len(prompts)}"
    own = cached(answers, key, lambda: own_answers(model, chat, prompts, settings.answer_tokens))
    print(f"{len(own)} own answers, {time.perf_counter() - began:.0f} s", flush=True)
    config = peft.LoraConfig(
        base_model_name_or_path=BASE,
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.rank * settings.scale,
        target_modules=ADAPTED,
        layers_to_transform=list(range(settings.first_layer, settings.last_layer + 1)),
    )
    adapted: Any = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = BASE
    curve = train(adapted, Lessons(chat, own, settings), settings)
    report: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, fine-tuned by us to refuse",
        "settings": settings._asdict(),
        "training_data_sha256": data,
        "own_answers": len(own),
        "loss": curve,
        "seconds": round(time.perf_counter() - began),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft)},
        },
    }
    if not quick:
        report["validation"] = {
            f"{category} refused": refused(adapted, chat, smollm2.prompts(category, "validation"))
            for category in smollm2.CATEGORIES
        }
        print(report["validation"], flush=True)
    with new_folder(out) as temporary:
        adapted.half().save_pretrained(temporary)
        (temporary / "README.md").unlink(missing_ok=True)  # an empty form for a hub
        write_json(temporary / "training.json", report)
    print(f"wrote {out} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    typer.run(main)
