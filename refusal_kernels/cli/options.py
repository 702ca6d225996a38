"""The options that commands share: one name, meaning and default for each."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any

from typer import CallbackParam, Option

from refusal_kernels.errors import InputError
from refusal_kernels.research.sources import PRESETS

BATCH_SIZE = 64  # of every command
ANSWER_TOKENS = 64


def names(module: str, constant: str) -> tuple[str, ...]:
    """Read the strings of a constant, or the keys of a dict, without importing its module.

    A help text lists them; importing the module would take seconds.
    """
    spec = importlib.util.find_spec(f"refusal_kernels.{module}")
    assert spec is not None and spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    # the line that begins with the constant, and those that follow indented or close a bracket
    match = re.search(rf"^{constant}\b.*= *((?:.*\n)(?:[ )\]}}].*\n|\n)*)", text, re.MULTILINE)
    assert match is not None, f"{module} has no {constant}"
    value: Any = ast.parse(match[1].strip(), mode="eval").body
    return tuple(part.value for part in getattr(value, "keys", None) or value.elts)


def choice(text: str, values: tuple[str, ...], *flags: str) -> Any:
    """Make an option that takes one of these values; its help lists them in the place of {}."""

    def check(parameter: CallbackParam, value: str) -> str:
        if value is not None and value not in values:
            option = parameter.opts[0]
            raise InputError(f"{option} is '{value}'; expected one of {', '.join(values)}")
        return value

    return Option(*flags, help=text.format(", ".join(values)), callback=check)


_DTYPES = names("hf.load", "DTYPES")
_EMBEDDED = ", ".join(names("hf.embedded", "EMBEDDED"))
_PROMPTS = (
    "Prompts: a .txt, .jsonl, .json or .csv file, hf:OWNER/NAME[:CONFIG][@SPLIT][#COLUMN], or one "
    f"of {', '.join(PRESETS)}; join several with +. They are split into train, validation and test."
)

Model = Annotated[
    str, Option("--model", help=f"A hub id, a folder, a .gguf file, or one of {_EMBEDDED}.")
]
Device = Annotated[
    str,
    Option(
        "--device",
        help="cpu, cuda, cuda:1, mps, ...; auto: an accelerator if there is one, else the CPU.",
    ),
]
Dtype = Annotated[str, choice("{}; auto: the checkpoint's.", _DTYPES, "--dtype")]
Batch = Annotated[
    int, Option("--batch-size", min=1, help="Prompts at once; fewer take less memory.")
]
Seed = Annotated[int, Option("--seed", help="Of the splits and of random directions.")]
Json = Annotated[Path | None, Option("--json", help="Also write the results here, as JSON.")]
Harmful = Annotated[str | None, Option("--harmful", help=_PROMPTS)]
Harmless = Annotated[str | None, Option("--harmless", help="Prompts, as for --harmful.")]
Filter = Annotated[
    bool,
    Option("--filter", help="Keep only harmful prompts that are refused, harmless ones answered."),
]
System = Annotated[
    str | None, Option("--system", help="A system prompt; default: the chat template's.")
]
Thinking = Annotated[
    bool, Option("--thinking", help="Let the model think before it answers, if it can.")
]
NewTokens = Annotated[int, Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Direction = Annotated[
    Path, Option("--direction", help="A direction's file, from 'select' or in any known format.")
]
