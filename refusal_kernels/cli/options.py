"""The options that commands share: one name, meaning and default for each."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any

from typer import CallbackParam, Option

from refusal_kernels.errors import InputError
from refusal_kernels.hf.load_options import ATTENTIONS, DTYPES, PRECISIONS
from refusal_kernels.research.prompt_files import SUFFIXES
from refusal_kernels.research.sources import PRESETS, SIZES

BATCH_SIZE = 64  # of every command
AUTO, ALL = "auto", "all"
TRANSFORMERS, VLLM = ENGINES = ("transformers", "vllm")
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


_EMBEDDED = ", ".join(names("hf.embedded", "EMBEDDED"))
_PROMPTS = (
    f"Prompts: a file ({', '.join(SUFFIXES)}), hf:OWNER/NAME[:CONFIG][@SPLIT][#COLUMN], or one of "
    f"{', '.join(PRESETS)}; join several with +. They are split into train, validation and test; "
    "train=SOURCE,validation=SOURCE,test=SOURCE names the splits."
)

Model = Annotated[
    str, Option("--model", help=f"A hub id, a folder, a .gguf file, or one of {_EMBEDDED}.")
]
Device = Annotated[
    str,
    Option(
        "--device",
        help="cpu, cuda, cuda:1, mps, ...; auto: all accelerators, with what does not fit there "
        "on the CPU.",
    ),
]
Dtype = Annotated[str, choice("{}; auto: the checkpoint's.", DTYPES, "--dtype")]
LoadIn = Annotated[
    str | None,
    choice("{}: quantize at load, by bitsandbytes or torchao.", PRECISIONS, "--load-in"),
]
TensorParallel = Annotated[
    bool, Option("--tensor-parallel", help="The processes of torchrun share one model.")
]
Revision = Annotated[
    str | None, Option("--revision", help="A branch, tag or commit of the model on the hub.")
]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Run the code that comes with the model.")
]
Attention = Annotated[
    str | None, choice("{}; default: transformers chooses.", ATTENTIONS, "--attn")
]
Adapter = Annotated[
    str | None, Option("--adapter", help="A PEFT adapter for the model, merged if it can be.")
]
Engine = Annotated[
    str,
    choice("What runs the model: {}.", ENGINES, "--engine"),
]
TensorRanks = Annotated[
    int, Option("--tensor-parallel-size", min=1, help="Devices that share each layer, for vllm.")
]
PipelineRanks = Annotated[
    int, Option("--pipeline-parallel-size", min=1, help="Devices in a row, for vllm.")
]
EngineArgs = Annotated[
    str,
    Option("--engine-args", metavar="JSON", help="More arguments of vllm.LLM, as a JSON object."),
]
Offline = Annotated[bool, Option("--offline", help="Use only files that are on this machine.")]
Batch = Annotated[
    int,
    Option(
        "--batch-size",
        min=1,
        help="Prompts at once; fewer take less memory. Benchmarks: 16 at most.",
    ),
]
Seed = Annotated[int, Option("--seed", help="Of the splits and of random directions.")]
Json = Annotated[Path | None, Option("--json", help="Also write the results here, as JSON.")]
Harmful = Annotated[str | None, Option("--harmful", help=_PROMPTS)]
Harmless = Annotated[str | None, Option("--harmless", help="Prompts, as for --harmful.")]
Column = Annotated[
    str | None,
    Option("--column", help="The column of the prompts; default: the first that is known."),
]
Split = Annotated[
    str | None,
    choice("The part of the prompts: {}; default: the step's own.", (*SIZES, ALL), "--split"),
]
RefusalTokens = Annotated[
    str,
    Option(
        "--refusal-tokens",
        help="Tokens that begin a refusal: auto (found in the model's answers), paper (the paper's "
        "table, for its models), or ids and texts: 40,As.",
    ),
]
SAMPLES = 4
Samples = Annotated[
    int,
    Option("--samples", min=0, help="Prompts of each set that the page shows, folded; 0: none."),
]
KlThreshold = Annotated[
    float, Option("--kl-threshold", help="Discard candidates with a larger KL, nats.")
]
InduceThreshold = Annotated[
    float, Option("--induce-threshold", help="Discard candidates with a lower induce score, nats.")
]
PruneLast = Annotated[
    float,
    Option("--prune-last", min=0, max=1, help="Discard this share of the layers, the last ones."),
]
Closest = Annotated[
    bool, Option("--closest", help="If no candidate passes, take the one that comes closest.")
]
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
AnswerPrefix = Annotated[
    str,
    Option(
        "--answer-prefix",
        help="What every answer begins with, such as an empty thought; auto: found in the model's "
        "answers.",
    ),
]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Say all of it, not one line.")]
NewTokens = Annotated[int, Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Direction = Annotated[
    Path, Option("--direction", help="A direction's file, from 'select' or in any known format.")
]
