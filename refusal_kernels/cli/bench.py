"""What steering costs: every way to ablate, timed beside the unmodified model."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rich.console import Console
from typer import Exit, Option

from refusal_kernels.cli import options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.common import choose_device, console, errors, prepare
from refusal_kernels.errors import InputError

T = TypeVar("T")
_PROFILES = options.names("bench.grid", "PROFILES")
_SHAPES = options.names("bench.shapes", "SHAPES")
_METHODS = sorted(p.stem for p in Path(__file__).parents[1].glob("bench/methods/[a-z]*.py"))


def bench(
    profile: Annotated[str, options.choice("How much is measured: {}.", _PROFILES)] = "quick",
    methods: Annotated[
        str | None,
        Option(
            help=f"own ({', '.join(_METHODS)}), peers, engines, a method's name or "
            "FILE.py[@PYTHON], separated by commas. Default: own,peers."
        ),
    ] = None,
    models: Annotated[
        str | None,
        Option(
            "--models",
            "--model",
            help=f"{', '.join(_SHAPES)} (random weights), toy, a hub id or a folder.",
        ),
    ] = None,
    phases: Annotated[str | None, Option(help="decode, prefill.")] = None,
    batch: Annotated[str | None, Option(help="Rows at once: 1,8.")] = None,
    dtypes: Annotated[str | None, Option(help="float32, bfloat16, float16.")] = None,
    modes: Annotated[str | None, Option(help="eager, compile, graph (GPU).")] = None,
    steered_layers: Annotated[
        str | None, Option(help="In how many blocks to ablate: all,1.")
    ] = None,
    programs: Annotated[
        str | None, Option(help="Directions in a batch, one for each row: 1,4.")
    ] = None,
    layers: Annotated[int | None, Option(help="Keep this many layers of each model.")] = None,
    rounds: Annotated[int | None, Option(help="The most rounds, 7 or more.")] = None,
    minutes: Annotated[float | None, Option(help="Begin no cell after this many minutes.")] = None,
    threads: Annotated[int | None, Option(help="CPU threads; default: all cores.")] = None,
    device: options.Device = "auto",
    out: Annotated[Path, Option(help="The folder of the results.")] = Path("out/bench"),
    peers: Annotated[
        Path | None, Option(help="The folder of the peers' methods; default: the checkout's.")
    ] = None,
    answer_s: Annotated[
        float, Option("--answer-limit", help="The most seconds a method may take to answer.")
    ] = 240.0,
    compare_with: Annotated[
        Path | None, Option("--compare", help="An earlier .jsonl; exit code 1 if slower.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Keep the cells of --out.")] = False,
    json_file: options.Json = None,
) -> None:
    """Time every way to ablate beside the unmodified model, and check each.

    Writes overhead-DEVICE.jsonl, .png and .html to --out, the first after every cell.
    """
    from refusal_kernels.bench import catalog, report
    from refusal_kernels.bench.grid import grid_for
    from refusal_kernels.bench.plots import plot_cells
    from refusal_kernels.bench.results import compare, read_results, write_results
    from refusal_kernels.bench.run import Run
    from refusal_kernels.bench.settings import BenchSettings

    old = read_results(compare_with) if compare_with is not None else None
    where = choose_device(device)
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"--threads is {threads}; expected 1 to 1024")
    if minutes is not None and not 0 < minutes < 1e5:
        raise InputError(f"--minutes is {minutes}; expected more than 0")
    if answer_s <= 0:
        raise InputError(f"--answer-limit is {answer_s}; expected more than 0")
    blocks = _list("--steered-layers", steered_layers, lambda n: None if n == "all" else int(n))
    given: dict[str, Any] = {
        "models": _list("--models", models, str),
        "phases": _list("--phases", phases, str),
        "batch": _list("--batch", batch, int),
        "dtypes": _list("--dtypes", dtypes, str),
        "modes": _list("--modes", modes, str),
        "steered": blocks,
        "programs": _list("--programs", programs, int),
        "layers": layers,
        "rounds": rounds,
        "limit_s": None if minutes is None else 60 * minutes,
    }
    settings = BenchSettings(
        profile,
        grid_for(profile, where, given),
        tuple(catalog.find(_list("--methods", methods, str), where, peers or catalog.PEERS)),
        where,
        threads or os.cpu_count() or 1,
        out,
        answer_s,
    )
    prepare(json_file)
    with progress_bars() as step:
        tell = step("bench")
        last = ""

        def say(text: str, done: int, total: int) -> None:
            nonlocal last
            tell(done, total)
            if errors.is_terminal or text.split(":")[0] == last:
                return
            last = text.split(":")[0]
            errors.print(text, highlight=False)

        document = Run(settings, resume, say)()
    wide = console if console.is_terminal else Console(width=200)
    report.print_table(document, wide, where)
    report.write_page(settings.path.with_suffix(".html"), document)
    plot_cells(settings.path.with_suffix(".png"), document)
    console.print(f"written: {settings.path}.jsonl, .html, .png")
    if json_file is not None:
        write_results(json_file, document)
        console.print(f"written: {json_file}")
    if old is not None:
        worse, compared = compare(document, old)
        for text in worse:
            console.print(f"slower: {text}", highlight=False)
        console.print(f"{len(worse)} of {compared} rows fell by more than the noise")
        if worse:
            raise Exit(1)


def _list(option: str, text: str | None, kind: Callable[[str], T]) -> tuple[T, ...] | None:
    """Split at the commas; None where nothing was given."""
    if text is None:
        return None
    try:
        values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        raise InputError(f"{option} is '{text}'; expected whole numbers with commas") from None
    if "" in values:
        raise InputError(f"{option} is '{text}'; expected values with commas between them")
    return values
