"""Options that go together, as dataclasses: a command takes a group as one parameter.

`expanded` gives Typer one option for each field. A field is declared like a command's parameter,
with an annotation of `options` and a default.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from rich.text import Text

from refusal_kernels.cli import common, options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.files.atomic import parse_json
from refusal_kernels.hf.load_options import LoadOptions
from refusal_kernels.progress import single_step
from refusal_kernels.research.sources import SEED

if TYPE_CHECKING:  # torch takes seconds to import
    from refusal_kernels.direction import Direction
    from refusal_kernels.hf.chat import ChatFormat


@dataclass(frozen=True)
class LoadingOptions:
    """Which model, and how it is loaded."""

    model: options.Model = "toy"
    device: options.Device = "auto"
    dtype: options.Dtype = "auto"
    load_in: options.LoadIn = None
    tensor_parallel: options.TensorParallel = False
    revision: options.Revision = None
    trust_remote_code: options.TrustRemoteCode = False
    attn: options.Attention = None
    adapter: options.Adapter = None
    offline: options.Offline = False

    def __post_init__(self) -> None:
        """Check the values, before anything heavy is imported."""
        self.how()
        if self.offline:  # read by the libraries that fetch models and data sets, at their import
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    def how(self) -> LoadOptions:
        """Return how any model of the command is loaded."""
        values = {field.name: getattr(self, field.name) for field in fields(LoadOptions)}
        return LoadOptions(**values)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run a command: in all processes that share the model, of which the first one prints."""
        if not self.tensor_parallel:
            yield
            return
        from refusal_kernels.research.extraction.distributed import joined

        with joined(one_model=True) as (rank, _):
            common.console.quiet = rank > 0
            yield

    def resumable(self, state: Path) -> Path | None:
        """Return the file for the state of a run, if it can resume.

        Processes that share a model hold different parts of it, so no state fits all of them.
        """
        return None if self.tensor_parallel else state

    def load(
        self, direction: Direction | None = None, reads: Callable[[Any], int] | None = None
    ) -> tuple[Any, Any]:
        """Load the model and its tokenizer, and check that a direction fits it."""
        from refusal_kernels.hf.load import load

        common.choose_device(self.device)
        return load(self.model, direction=direction, **vars(self.how()))


started: list[Any] = []
"""The engines that run; `EngineOptions.running` stops them."""
# what vLLM does itself, or not at all
NOT_WITH_ENGINE = ("device", "load_in", "tensor_parallel", "attn", "adapter")
# what a command gives the engine itself
TAKEN_BY_OPTIONS = {
    "model": "it as --model",
    "tensor_parallel_size": "it as --tensor-parallel-size",
    "pipeline_parallel_size": "it as --pipeline-parallel-size",
    "positions": "none: the command says how many it reads",
    "programs": "none: the command makes its own",
}


@dataclass(frozen=True)
class EngineOptions(LoadingOptions):
    """Which model, how it is loaded, and what runs it."""

    engine: options.Engine = options.TRANSFORMERS
    tensor_parallel_size: options.TensorRanks = 1
    pipeline_parallel_size: options.PipelineRanks = 1
    engine_args: options.EngineArgs = "{}"

    def __post_init__(self) -> None:
        """Check the values, before anything heavy is imported."""
        super().__post_init__()
        defaults = {field.name: field.default for field in fields(self)}
        served = self.engine == options.VLLM
        names = ("tensor_parallel_size", "pipeline_parallel_size", "engine_args")
        for name in NOT_WITH_ENGINE if served else names:
            if getattr(self, name) != defaults[name]:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} is not for --engine {self.engine}")
        if served and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("vLLM starts its own processes; expected no torchrun")
        self.arguments()

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``vllm.LLM`` that are given."""
        given = parse_json(self.engine_args, "--engine-args")
        if not isinstance(given, dict):
            raise InputError(f"--engine-args is {self.engine_args}; expected a JSON object")
        if taken := sorted({*given} & {*TAKEN_BY_OPTIONS}):
            option = TAKEN_BY_OPTIONS[taken[0]]
            raise InputError(f"--engine-args has {taken[0]!r}; expected {option}")
        if not isinstance(given.get("additional_config") or {}, dict):
            raise InputError("additional_config in --engine-args is no JSON object")
        return given

    @contextmanager
    def running(self) -> Iterator[None]:
        """See `LoadingOptions.running`; engines stop at the end."""
        try:
            with super().running():
                yield
        finally:
            while started:
                started.pop().close()

    def load(
        self, direction: Direction | None = None, reads: Callable[[Any], int] | None = None
    ) -> tuple[Any, Any]:
        """Load the model or start the engine; return it with the tokenizer.

        `reads` says how many positions an engine reads, by the tokenizer.
        """
        if self.engine != options.VLLM:
            return super().load(direction)
        from refusal_kernels.hf.chat_models import load_tokenizer
        from refusal_kernels.hf.load import check_hidden, model_folder
        from refusal_kernels.vllm.engine import Engine

        source = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            tokenizer = load_tokenizer(model_folder(self.model), **source)
        except InputError:
            raise
        except Exception as error:  # whatever a hub or a damaged file can bring
            why = first_line(error).rstrip(".")
            if "trust_remote_code" in str(error):
                why = "it brings code of its own; read it, then give --trust-remote-code"
            raise InputError(f"model '{self.model}' cannot be loaded: {why}") from None
        engine = Engine(
            self.model,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            positions=0 if reads is None else reads(tokenizer),
            **{"dtype": self.dtype, **source, **self.arguments()},
        )
        started.append(engine)
        check_hidden(self.model, engine, direction)
        return engine, tokenizer


@dataclass(frozen=True)
class ChatOptions:
    """How the model is asked."""

    system: options.System = None
    thinking: options.Thinking = False
    answer_prefix: options.AnswerPrefix = ""
    batch_size: options.Batch = options.BATCH_SIZE

    def load(
        self,
        loading: LoadingOptions,
        prompts: Mapping[str, Sequence[str]],
        direction: Direction | None = None,
        positions: int | None = 0,
    ) -> tuple[Any, ChatFormat]:
        """Load the model and its chat format, and check that a direction fits it.

        An answer prefix that is to be found is found with these prompts. An engine reads so many
        `positions` at the end of a prompt; None: all that follow the instruction.
        """
        from refusal_kernels.hf.chat import ChatFormat
        from refusal_kernels.research.answer_prefix import find_answer_prefix

        with progress_bars() as step, single_step(step("Load the model")):
            model, tokenizer = loading.load(direction, partial(self._reads, positions))
        prefix = self.answer_prefix
        if prefix == options.AUTO:
            plain = ChatFormat(tokenizer, self.system, thinking=self.thinking)
            with progress_bars() as step, single_step(step("Find the answer prefix")):
                prefix = find_answer_prefix(model, plain, prompts, self.batch_size)
            common.console.print(Text(f"answer prefix: {prefix!r} (found)"), soft_wrap=True)
        chat = ChatFormat(tokenizer, self.system, thinking=self.thinking, answer_prefix=prefix)
        return model, chat

    def _reads(self, positions: int | None, tokenizer: Any) -> int:
        """Return how many positions an engine reads."""
        if positions is not None:
            return positions
        from refusal_kernels.hf.chat import ChatFormat
        from refusal_kernels.research.answer_prefix import TOKENS

        found = self.answer_prefix == options.AUTO  # once the engine runs
        prefix = "" if found else self.answer_prefix
        chat = ChatFormat(tokenizer, self.system, thinking=self.thinking, answer_prefix=prefix)
        return chat.positions + (2 * TOKENS if found else 0)


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompts of both classes come from."""

    harmful: options.Harmful = None
    harmless: options.Harmless = None
    column: options.Column = None
    seed: options.Seed = SEED

    def named(self, default: str) -> str:
        """Say where they come from; `default` says it of those that are not given."""
        sources = {"harmful": self.harmful, "harmless": self.harmless}
        if not any(sources.values()):
            return default
        return ", ".join(f"{name} {source or default}" for name, source in sources.items())


@dataclass(frozen=True)
class SplitOptions(PromptOptions):
    """Prompts of which a command uses one split."""

    split: options.Split = None

    def read(self, model: str, step: str) -> dict[str, Sequence[str]]:
        """Read the prompts of both classes: those of `step` if no split is named."""
        from refusal_kernels.research.prompts import prompts_for

        split = self.split or step
        part = None if split == options.ALL else split
        return prompts_for(model, part, self.harmful, self.harmless, self.seed, self.column)

    def tell(
        self, sets: Mapping[str, Sequence[str]], step: str, more: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Print how many prompts of what are used, and return it for the JSON.

        `more` has the sources of other sets than the two classes.
        """
        sources: dict[str, Any] = {"harmful": self.harmful, "harmless": self.harmless}
        used = {
            name: {"count": len(prompts), "source": str(sources[name] or "of the model"),
                   "split": self.split or step}
            if name in sources
            else {"count": len(prompts), "source": (more or {})[name], "split": options.ALL}
            for name, prompts in sets.items()
        }  # fmt: skip
        parts = [f"{u['count']} {name} ({u['source']}, {u['split']})" for name, u in used.items()]
        common.console.print(Text(f"prompts: {', '.join(parts)}"), soft_wrap=True)
        return used


@dataclass(frozen=True)
class RefusalOptions:
    """With which tokens a refusal begins."""

    refusal_tokens: options.RefusalTokens = options.AUTO

    @property
    def tokens(self) -> list[int | str] | str:
        """The tokens as `select` and the others take them."""
        from refusal_kernels.research.selection.scoring import AUTO, PAPER

        text = self.refusal_tokens
        if text in (AUTO, PAPER):
            return text
        return [int(part) if part.strip().isdecimal() else part for part in text.split(",")]

    @staticmethod
    def tell(chat: ChatFormat, tokens: Sequence[int]) -> None:
        """Print the tokens with their texts."""
        from refusal_kernels.research.selection.scoring import named_tokens

        common.console.print(Text(f"refusal tokens: {named_tokens(chat, tokens)}"), soft_wrap=True)


@dataclass(frozen=True)
class FilterOptions:
    """Whether only prompts are kept that the model treats as their class asks."""

    filter_prompts: options.Filter = False

    def apply(
        self,
        model: Any,
        template: ChatFormat,
        prompts: dict[str, Sequence[str]],
        refusals: RefusalOptions,
        batch_size: int,
    ) -> tuple[dict[str, Sequence[str]], dict[str, Any]]:
        """Return the prompts that stay, and those that do not by class, for the JSON."""
        from refusal_kernels.research.prompts import filtered

        if not self.filter_prompts:
            return prompts, {}
        with progress_bars() as step, single_step(step("Filter the prompts")):
            result = filtered(
                model, template, prompts, refusal_tokens=refusals.tokens, batch_size=batch_size
            )
        common.console.print(Text(f"filter: {result}"), soft_wrap=True)
        return result.kept, {"removed": result.removed}


@dataclass(frozen=True)
class ThresholdOptions:
    """What a candidate must pass to be selected."""

    kl_threshold: options.KlThreshold = 0.1
    induce_threshold: options.InduceThreshold = 0.0
    prune_last: options.PruneLast = 0.2
    closest: options.Closest = False

    def arguments(self) -> dict[str, Any]:
        """Return them as `select` takes them."""
        return vars(self).copy()


def expanded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return the command with the fields of its groups in the place of the groups."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(
                    field.name, parameter.KEYWORD_ONLY, default=default,
                    annotation=types[field.name],
                )
            )  # fmt: skip

    @wraps(command)
    def run(**values: Any) -> Any:
        common.refuse_one_file_twice(values)
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        loading = next((g for g in made.values() if isinstance(g, LoadingOptions)), None)
        with nullcontext() if loading is None else loading.running():
            return command(**values, **made)

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
