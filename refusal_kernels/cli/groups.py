"""Options that go together, as dataclasses: a command takes a group as one parameter.

`expanded` gives Typer one option for each field. A field is declared like a command's parameter,
with an annotation of `options` and a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from refusal_kernels.cli import common, options
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

    def load(self, direction: Direction | None = None) -> tuple[Any, Any]:
        """Load the model and its tokenizer, and check that a direction fits it."""
        from refusal_kernels.hf.load import load

        return load(self.model, common.choose_device(self.device), self.dtype, direction)


@dataclass(frozen=True)
class ChatOptions:
    """How the model is asked."""

    system: options.System = None
    thinking: options.Thinking = False
    batch_size: options.Batch = options.BATCH_SIZE

    def load(
        self, loading: LoadingOptions, direction: Direction | None = None
    ) -> tuple[Any, ChatFormat]:
        """Load the model and its chat format, and check that a direction fits it."""
        from refusal_kernels.hf.chat import ChatFormat

        model, tokenizer = loading.load(direction)
        return model, ChatFormat(tokenizer, self.system, thinking=self.thinking)


@dataclass(frozen=True)
class PromptOptions:
    """Where the prompts of both classes come from."""

    harmful: options.Harmful = None
    harmless: options.Harmless = None
    seed: options.Seed = SEED

    def of(self, split: str, model: str) -> dict[str, Sequence[str]]:
        """Read the prompts of one split of both classes; "all" for all of them."""
        from refusal_kernels.research.prompts import prompts_for

        part = None if split == "all" else split
        return prompts_for(model, part, self.harmful, self.harmless, self.seed)


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
        made = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        return command(**values, **made)

    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
