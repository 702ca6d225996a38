"""What the commands share: their options, the terminal, and how a result is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import write_json
from refusal_kernels.files.convert import SUFFIXES, Candidates, read
from refusal_kernels.progress import Progress, Step
from refusal_kernels.research.sources import PRESETS

console = Console()
errors = Console(stderr=True)
SPEED_S = 600.0  # the rate is that of the last ten minutes: a batch of a large model takes one

ModelOption = Annotated[str, typer.Option("--model", help="A hub id, a folder, or 'toy'.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
_PROMPTS = (
    "Prompts: a .txt, .jsonl, .json or .csv file, hf:OWNER/NAME[:CONFIG][@SPLIT][#COLUMN], or one "
    f"of {', '.join(PRESETS)}; several with +. Cut into train, validation and test by a seed."
)
HarmfulOption = Annotated[str | None, typer.Option(help=_PROMPTS)]
HarmlessOption = Annotated[str | None, typer.Option(help="Prompts, as for --harmful.")]
SeedOption = Annotated[int, typer.Option(help="Of the cut into train, validation and test.")]
FilterOption = Annotated[
    bool,
    typer.Option("--filter", help="Only prompts that the model refuses, or answers, as it should."),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="A system prompt; default: what the template says.")
]
ThinkingOption = Annotated[
    bool, typer.Option("--thinking", help="Let a model that can think before it answers do so.")
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Where an answer is cut.")]
BatchOption = Annotated[int, typer.Option(help="Prompts at once.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write what was found here too.")]
DirectionOption = Annotated[
    Path, typer.Option("--direction", help="Made by 'select', or the paper's direction.pt.")
]


def read_direction(path: Path) -> Direction:
    """Read a file that holds one direction, in any format.

    Raises
    ------
    InputError
        As `refusal_kernels.files.convert.read`; also if it holds something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        return Direction.load(path)
    found = read(path)
    if not isinstance(found, Direction):
        what = "candidates" if isinstance(found, Candidates) else "a control vector"
        raise InputError(f"{path} holds {what}; expected a direction: take one out with 'convert'")
    return found


def writable(path: Path) -> None:
    """Make the folder of a file that will be written; before the long work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror}") from None


def unfinished(path: Path) -> Path:
    """Return where the state of a run is kept that will write a file: beside it, as a part."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


def finish(out: Path | None, json_file: Path | None, document: Any) -> None:
    """Say what was written, and write the machine-readable result where one is wanted."""
    if out is not None:
        console.print(f"written: {out}")
    if json_file is not None:
        writable(json_file)
        write_json(json_file, document)
        console.print(f"written: {json_file}")


class _Rate(ProgressColumn):
    """How fast a step goes: a second's worth, or how long one takes where that is more."""

    def render(self, task: Task) -> Text:
        """Show nothing until there is something to go by."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def progress_bars(
    visible: bool = True,
) -> Iterator[Step]:
    """Give a function that announces a step and returns what is told of its progress.

    Shown are how much is done, how fast, since when, and for how much longer.
    """
    columns = (
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
        BarColumn(16),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars = progress.Progress(
        *columns,
        console=errors,
        speed_estimate_period=SPEED_S,
        expand=True,
        disable=not visible,
    )
    with bars:

        def step(description: str) -> Progress:
            task = bars.add_task(description, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield step


def named_sources(given: Sequence[str], option: str, needs_name: bool = False) -> dict[str, str]:
    """Split NAME=FILE; a file without a name has its own."""
    found: dict[str, str] = {}
    for item in given:
        name, equals, file = item.partition("=")
        if not equals:
            if needs_name:
                raise InputError(f"{option} is '{item}'; expected NAME=SOURCE")
            name, file = Path(item).stem, item
        if not name or not file or name in found:
            raise InputError(f"{option} is '{item}'; expected NAME=FILE, each name once")
        found[name] = file
    return found
