"""Answers of a model, with an intervention and without."""

import json
from pathlib import Path
from typing import Annotated

from rich.text import Text
from typer import Argument, Option

from refusal_kernels.cli import options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.common import console, finish, prepare, read_direction
from refusal_kernels.cli.groups import ChatOptions, LoadingOptions
from refusal_kernels.errors import InputError


def generate(
    prompt: Annotated[list[str] | None, Argument(help="One or more instructions.")] = None,
    *,
    loading: LoadingOptions,
    chat: ChatOptions,
    prompts: Annotated[
        str | None, Option("--prompts", help="Answer the prompts of a file or a set too.")
    ] = None,
    column: options.Column = None,
    direction: Annotated[
        Path | None, Option(help="Ablate this direction: a file as 'select' writes it.")
    ] = None,
    add: Annotated[bool, Option("--add", help="Add the direction instead.")] = False,
    block_input: Annotated[
        int | None, Option(help="Act at the input of this block; --add: default, the file's layer.")
    ] = None,
    strength: Annotated[float, Option(help="0 is no edit, 1 the whole edit.")] = 1.0,
    edit: Annotated[
        list[str] | None,
        Option(
            metavar="JSON",
            help='Any intervention, such as {"set": "direction.safetensors", "value": 0, '
            '"layers": [10, 11]}, instead of --direction; repeat for several together.',
        ),
    ] = None,
    max_new_tokens: options.NewTokens = options.ANSWER_TOKENS,
    verbose: options.Verbose = False,
    json_file: options.Json = None,
) -> None:
    """Answer prompts greedily, without an intervention and with it."""
    if prompts is None and not prompt:
        raise InputError("there is no prompt; expected one or more, or --prompts FILE")
    if direction is not None and edit:
        raise InputError("give --direction or --edit, not both")
    if direction is None and (add or block_input is not None or strength != 1.0):
        raise InputError("--add, --block-input and --strength need --direction")
    try:
        given = [json.loads(text) for text in edit or []]
    except ValueError as error:
        raise InputError(f"--edit is no JSON: {error}") from None
    loaded = None if direction is None else read_direction(direction)
    if loaded is not None:
        if add and block_input is None and loaded.layer is None:
            raise InputError(f"{direction} does not say at which layer to add; give --block-input")
        place = {} if block_input is None else {"block_input": block_input}
        given = [{"add" if add else "ablate": loaded, "strength": strength, **place}]

    from refusal_kernels.hf.generate import decoded, generate_ids
    from refusal_kernels.interventions import Intervention
    from refusal_kernels.patching.patch import patch
    from refusal_kernels.research.sources import read_prompts

    asked = [*(prompt or []), *([] if prompts is None else read_prompts(prompts, column))]
    program = [Intervention.from_dict(fields) for fields in given]
    prepare(json_file)
    model, template = chat.load(loading, {"prompts": asked}, loaded)

    def answers(name: str) -> list[str]:
        with progress_bars() as step:
            ids = generate_ids(
                model, template, asked, max_new_tokens, chat.batch_size,
                progress=step(f"Answer, {name}"),
            )  # fmt: skip
        return decoded(template, ids)

    steered = {}
    if program:  # first, so that an intervention that does not fit is refused at once
        with patch(model, program) as handle:
            console.print(Text(f"patch: {handle.report()}"), soft_wrap=True)
            if verbose:
                console.print(Text(handle.report().details), soft_wrap=True)
            name = "+".join(intervention.name for intervention in program)
            steered[name] = answers(name)
    texts = {"unmodified": answers("unmodified"), **steered}
    for i, text in enumerate(asked):
        console.print(Text(text, style="bold"))
        for name, completions in texts.items():
            console.print(Text(f"  {name}: {completions[i]}"))
    finish(None, json_file, {"prompts": asked, **texts})
