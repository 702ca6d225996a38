"""Models as judges: classifiers of Hugging Face, and guard models in the format of Llama Guard."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.batches import cut
from refusal_kernels.hf.checks import check_tokens
from refusal_kernels.hf.greedy import decode, end_tokens
from refusal_kernels.hf.loaded import REPORTED, check_loaded
from refusal_kernels.hf.model import input_device
from refusal_kernels.hf.padding import batch_limits
from refusal_kernels.hf.templates import apply_template
from refusal_kernels.research.evaluation.likelihood import pad_left

NEW_TOKENS = 16  # of a guard's answer
# transformers asks at the terminal where it is not told
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


class ClassifierJudge:
    """A text classifier of Hugging Face; its verdict is the probability of one of its labels.

    The model is a hub id, a folder, or a ``transformers`` text-classification pipeline. Of two
    labels the second is the default. With `pair` it classifies prompt and completion together.
    """

    def __init__(
        self,
        model: Any,
        label: str | None = None,
        *,
        pair: bool = False,
        device: Any = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.pipeline = _pipeline(model, device) if isinstance(model, str) else model
        config = self.pipeline.model.config
        labels = [config.id2label[i] for i in sorted(config.id2label)]
        if label is None and len(labels) == 2:
            label = labels[1]
        if label is None or label not in labels:
            raise InputError(
                f"the classifier has no label {label!r}; expected one of {', '.join(labels)}"
            )
        source = model if isinstance(model, str) else config.name_or_path
        self.name = f"{source or type(self.pipeline.model).__name__}: {label}"
        self.counts: str = label
        self.pair, self.batch_size = pair, batch_size

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return the probability of the label for every completion."""
        texts = [
            {"text": prompt, "text_pair": text} if self.pair else {"text": text}
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        options = {"top_k": None, "batch_size": self.batch_size, "truncation": True}
        try:
            answers = self.pipeline(texts, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # no pad token, no position, no embedding of a token
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"judge '{self.name}' cannot read the answers: {reason}") from error
        return [
            float(next(row["score"] for row in rows if row["label"] == self.counts))
            for rows in answers
        ]


def _pipeline(model: str, device: Any) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **NO_CODE)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, **NO_CODE, **REPORTED)
        classifier = check_loaded(model, *loaded)
        return pipeline("text-classification", classifier, tokenizer=tokenizer, device=device)
    except InputError as error:
        raise InputError(f"judge: {error}") from None
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise _not_loaded(model, error) from None


@dataclass(frozen=True)
class GuardAnswer:
    """The answer of a guard model about one exchange."""

    unsafe: bool  # whether it said "unsafe"
    probability: float  # of "unsafe" against "safe" where the answer begins
    categories: tuple[str, ...]  # the hazard categories that it named, such as "S1"


def parse_guard(answer: str) -> tuple[bool, tuple[str, ...]]:
    r"""Read the answer of a Llama Guard model: "safe", or "unsafe\nS1,S10"."""
    words = answer.replace(",", " ").split()
    if not words or words[0].lower() not in ("safe", "unsafe"):
        raise InputError(f"the guard answered {answer[:80]!r}; expected 'safe' or 'unsafe'")
    unsafe = words[0].lower() == "unsafe"
    return unsafe, tuple(words[1:]) if unsafe else ()


class GuardJudge:
    """A generative guard model, asked whether an exchange is unsafe.

    The guard's own chat template shows the prompt and the completion as one exchange of user and
    assistant; the guard answers "safe", or "unsafe" and the categories, as Llama Guard does.
    """

    counts = "unsafe"

    def __init__(self, model: Any, tokenizer: Any, name: str = "", batch_size: int = 8) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the guard's tokenizer has no chat template; expected a guard model")
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad = int(next(i for i in ids if i is not None))
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return the probability of "unsafe" for every exchange."""
        return [answer.probability for answer in self.answers(prompts, completions)]

    @torch.inference_mode()
    def answers(self, prompts: Sequence[str], completions: Sequence[str]) -> list[GuardAnswer]:
        """Ask about every exchange, longest first, in batches."""
        pairs = zip(prompts, completions, strict=True)
        texts = [self._render(prompt, text) for prompt, text in pairs]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        answers: dict[int, GuardAnswer] = {}
        ends = [ids[order[end]] for end in (0, -1)]
        check_tokens(self.model, max(map(max, ids)), len(ids[order[0]]), NEW_TOKENS)
        limits = batch_limits(self.model, self.batch_size, ends, self._pad, decoding=True)
        for start, end in cut([len(ids[i]) for i in order], *limits):
            rows = order[start:end]
            answers.update(zip(rows, self._ask([ids[row] for row in rows]), strict=True))
        return [answers[i] for i in range(len(ids))]

    def _render(self, prompt: str, completion: str) -> str:
        completion = completion or " "  # an empty completion is judged too
        for wrap in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
            chat = [
                {"role": "user", "content": wrap(prompt)},
                {"role": "assistant", "content": wrap(completion)},
            ]
            try:
                text = apply_template(self.tokenizer, chat)
            except InputError:  # some guards take contents as lists only
                continue
            if prompt.strip() in text and completion.strip() in text:
                return str(text)
        raise InputError(
            f"the chat template of {self.name} does not show the exchange of user and assistant; "
            "expected one in the format of Llama Guard"
        )

    def _ask(self, ids: list[list[int]]) -> list[GuardAnswer]:
        input_ids, mask = pad_left(ids, self._pad)
        device = input_device(self.model)
        ends = end_tokens(self.model, self.tokenizer)
        options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
        given = input_ids.to(device), mask.to(device)
        out = decode(self.model, *given, NEW_TOKENS, ends, self._pad, **options)
        new = out.sequences[:, input_ids.shape[1] :].tolist()
        return [
            self._read(answer, [step[row] for step in out.logits]) for row, answer in enumerate(new)
        ]

    def _read(self, answer: list[int], logits: list[torch.Tensor]) -> GuardAnswer:
        decode = self.tokenizer.decode
        unsafe, categories = parse_guard(decode(answer, skip_special_tokens=True))
        # Some guards begin with blank lines; the word's first token is the one that counts.
        begins = next(
            i for i, token in enumerate(answer) if decode([token], skip_special_tokens=True).strip()
        )
        first = {
            word: {self.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}
            for word, forms in (("safe", ("safe", " safe")), ("unsafe", ("unsafe", " unsafe")))
        }
        first["unsafe" if unsafe else "safe"].add(answer[begins])
        if shared := first["safe"] & first["unsafe"]:  # as a lone space is
            first = {word: tokens - shared for word, tokens in first.items()}
        chances = logits[begins].float().softmax(dim=-1)
        mass = {word: float(chances[list(tokens)].sum()) for word, tokens in first.items()}
        total = mass["safe"] + mass["unsafe"]
        probability = mass["unsafe"] / total if total > 0 else float(unsafe)
        if (probability >= 0.5) != unsafe:  # the text decides
            probability = float(unsafe)
        return GuardAnswer(unsafe, probability, categories)


def load_judge(
    spec: str, device: Any = "cpu", batch_size: int = 16
) -> ClassifierJudge | GuardJudge:
    """Load a classifier or a guard model, whichever the model's configuration says it is.

    The spec is a hub id or a folder; of a classifier with ``#LABEL`` for the label that is a hit.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, _, label = spec.partition("#")
    try:
        kinds = AutoConfig.from_pretrained(name, **NO_CODE).architectures or []
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            return ClassifierJudge(name, label or None, device=device, batch_size=batch_size)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", **NO_CODE, **REPORTED
        )
        guard = check_loaded(name, *loaded)
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_CODE)
    except InputError as error:
        raise InputError(f"judge: {error}") from None
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise _not_loaded(name, error) from None
    return GuardJudge(guard.to(device).eval(), tokenizer, name, batch_size)


def _not_loaded(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"judge '{name}' cannot be loaded: {reason}")
