"""What ablation costs on whole models: tokens/s of each way to do it, over the model's own.

    python benchmarks/bench_model.py --out out/bench

times two models with random weights at the shapes of real ones (what weights are in it does not
change the time), or any model with ``--models ID_OR_FOLDER``; prints a table and writes
``models-<device>.csv``, ``.json`` and ``.png``. All methods run in every round, each on its own
copy of the modules around the same weights, so that nothing is patched inside the timed region.
Every cell is also checked: what is left of the direction, and the logits.
"""

import argparse
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cases import DTYPES
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from rows import OK, write_csv
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers import StaticCache as FixedCache

from refusal_kernels import Ablate, Direction, patch
from refusal_kernels.bench import shapes
from refusal_kernels.bench.worker import around_the_same_weights
from refusal_kernels.environment import clock_mhz, describe_device, versions
from refusal_kernels.errors import first_line
from refusal_kernels.files.atomic import replacing, write_json
from refusal_kernels.hf.forward import LAST
from refusal_kernels.hf.model import decoder, decoder_layers, hidden_size
from refusal_kernels.patching.paper_hooks import paper_hooks
from refusal_kernels.research.plots import BLUE, GRAY, GREEN, INK, STYLE
from refusal_kernels.timing import FEWEST, Speed, interleaved

SHAPES = {name: shapes.SHAPES[name] for name in ("qwen2.5-0.5b", "llama-3.2-1b")}
WORKS = (("decode", 1, 128), ("decode", 8, 128), ("prefill", 1, 512))  # name, batch, tokens
GRID = {  # dtypes and modes
    "cpu": (("float32", "bfloat16"), ("eager",)),
    "cuda": (("bfloat16", "float16"), ("eager", "compile", "graph")),
}
# A measurement is short and there are many rounds, since what differs is a few thousandths, and a
# median over the same minutes is the steadier, the more often the methods take turns.
MEASURE_S, MOST = 0.05, 16  # the work is repeated for about so long, at most so often
MOST_ROUNDS = 2001

BASE, FUSED, UNFUSED, HOOKS = "unmodified", "patched", "patched, norms apart", "hooks"
Method = Callable[[Any, Direction], AbstractContextManager[Any]]
"""Changes a model, until it is left; what it gives is a `PatchHandle`, or None."""
METHODS: dict[str, Method] = {
    BASE: lambda model, direction: nullcontext(),
    FUSED: lambda model, direction: patch(model, Ablate(direction)),
    UNFUSED: lambda model, direction: patch(model, Ablate(direction), fuse_norms=False),
    HOOKS: paper_hooks,
}
# The hooks round the direction and every product to the model's dtype, so in a half precision they
# are the less exact of the two that are compared.
LOGITS_WITHIN = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Cell:
    """What is measured at once: a model, and the work that every method does with it."""

    model: str
    layers: int
    hidden: int
    dtype: str
    mode: str
    work: str
    batch: int
    tokens: int

    def __str__(self) -> str:
        size = f"{self.work} {self.batch} x {self.tokens}"
        return f"{self.model}, {self.layers} layers, {self.dtype}, {self.mode}, {size}"


@dataclass
class Row:
    """One method in one cell.

    Attributes
    ----------
    status
        ``ok``, or why there is no time.
    repeats
        How often the work is done in one measurement: the steps of a decode.
    sites, residual
        Of a patched model: the sites that were seen, and the largest ``|r . h| / |h|`` at any.
    logits_difference
        The largest to the model with plain hooks, run eagerly, over the largest of its logits. For
        the unmodified model it is what the ablation does.
    right
        Whether these are as they must be; None for the unmodified model.
    """

    cell: Cell
    method: str
    status: str = OK
    speed: Speed | None = None
    repeats: int = 0
    sites: int | None = None
    residual: float | None = None
    logits_difference: float | None = None

    @property
    def right(self) -> bool | None:
        """Whether the method did what it is timed for."""
        if self.method == BASE or self.status != OK or self.logits_difference is None:
            return None
        right = self.logits_difference <= LOGITS_WITHIN[self.cell.dtype]
        if self.residual is not None:
            right &= self.residual <= 4 * torch.finfo(DTYPES[self.cell.dtype]).eps
            right &= self.sites == 1 + 2 * self.cell.layers
        return right

    def record(self) -> dict[str, Any]:
        """Return everything, flat; None where there is nothing."""
        speed = self.speed
        q1, q3 = speed.quartiles if speed else (None, None)
        low, high = speed.interval if speed and len(speed.ratios) >= FEWEST else (None, None)
        return asdict(self.cell) | {
            "method": self.method,
            "status": self.status,
            "ratio": speed.median if speed else None,
            "ratio_low": low,  # of the 95 % interval
            "ratio_high": high,
            "ratio_q1": q1,
            "ratio_q3": q3,
            "tokens_per_second": speed.tokens_per_second if speed else None,
            "rounds": len(speed.ratios) if speed else 0,
            "repeats": self.repeats,
            "sites": self.sites,
            "residual": self.residual,
            "logits_difference": self.logits_difference,
            "right": self.right,
        }


# --- models --------------------------------------------------------------------------------------


def build(name: str, layers: int | None, dtype: str, device: str) -> Any:
    """Return a model: with random weights at one of `SHAPES`, or what a hub or a folder has."""
    config = SHAPES[name]() if name in SHAPES else AutoConfig.from_pretrained(name)
    if layers is not None and layers < config.num_hidden_layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    if name in SHAPES:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        for parameter in model.parameters():  # as they are made, norms and biases do nothing
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=DTYPES[dtype])
    return model.to(device).eval().requires_grad_(False)


@torch.inference_mode()
def direction_of(model: Any) -> Direction:
    """Return one that the stream lies along, so that leaving it in would be seen in the logits."""
    ids = torch.arange(1, 33, device=model.device)[None] % model.config.vocab_size
    streams = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return Direction(streams[len(streams) // 2][0].float().mean(0).cpu())


# --- the work ------------------------------------------------------------------------------------


class Work:
    """What one method does in a cell; made, rewound and run in inference mode."""

    def __init__(self, model: Any, cell: Cell) -> None:
        self.cell, self.call, self.cache, self.repeats = cell, model, None, 1
        ids = torch.arange(cell.batch * (cell.tokens + 1)) * 7919 % model.config.vocab_size
        ids = ids.view(cell.batch, -1).to(model.device)
        self.fed: dict[str, Any] = {"input_ids": ids[:, :-1]}
        self.fed["logits_to_keep"] = LAST.to(model.device)
        self.fed["use_cache"] = cell.work == "decode"
        if self.fed["use_cache"]:
            room = cell.tokens + MOST
            fixed = cell.mode != "eager"
            self.cache = (
                FixedCache(model.config, room) if fixed else DynamicCache(config=model.config)
            )
            # versions of transformers call it differently
            named = "cache" in inspect.signature(decoder(model).forward).parameters
            self.fed["cache" if named else "past_key_values"] = self.cache
            model(**self.fed)
            self.fed["input_ids"] = ids[:, -1:].contiguous()

    def once(self) -> Tensor:
        """Return the logits of a prompt, or of the next token of every row."""
        logits: Tensor = self.call(**self.fed).logits
        return logits

    def __call__(self) -> Tensor:
        """Return the logits of the last of the repeats."""
        for _ in range(self.repeats):
            logits = self.once()
        return logits

    def rewind(self) -> None:
        """Take out of the cache what the last run put there."""
        if isinstance(self.cache, FixedCache):
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.cell.tokens)
        elif self.cache is not None:
            self.cache.crop(-(self.cache.get_seq_length() - self.cell.tokens))

    def prepare(self) -> None:
        """Compile or capture, as the mode wants it."""
        if self.cell.mode == "compile":
            self.call = torch.compile(self.call, dynamic=False)
            self.once()
        elif self.cell.mode == "graph":
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.once()
                    self.rewind()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.call(**self.fed)
            self.call = lambda **fed: (graph.replay(), out)[1]
        self.rewind()


@contextmanager
def rewound(work: Work) -> Iterator[None]:
    """Rewind after a measurement, outside the time that is taken."""
    try:
        yield
    finally:
        with torch.inference_mode():
            work.rewind()


def watched(work: Work, handle: Any, direction: Direction) -> tuple[int, float]:
    """Return the sites of a patched model, and the largest ``|r . h| / |h|`` at any of them."""
    found: dict[str, float] = {}
    unit = direction.unit.double()

    def see(name: str, h: Tensor) -> None:
        rows = h.reshape(-1, h.shape[-1]).double()
        worst = (rows @ unit.to(h.device)).abs() / rows.norm(dim=-1)
        found[name] = max(float(worst.max()), found.get(name, 0.0))

    with handle.watch(see):
        work.once()
    work.rewind()
    return len(found), max(found.values(), default=float("inf"))


def measure(model: Any, direction: Direction, cell: Cell, options: argparse.Namespace) -> list[Row]:
    """Check and time every method; one that fails is a row that says why."""
    rows = {name: Row(cell, name) for name in METHODS}
    works: dict[str, Work] = {}
    logits: dict[str, Tensor] = {}
    truth: Tensor | None = None
    torch._dynamo.reset()
    with ExitStack() as stack:
        # the copies share their code, and by default a hook is nothing that a graph is guarded by
        guarded = torch._dynamo.config.patch(recompile_limit=64, skip_nnmodule_hook_guards=False)
        stack.enter_context(guarded)
        for name, method in METHODS.items():
            try:
                own = around_the_same_weights(model)
                handle = stack.enter_context(method(own, direction))
                with torch.inference_mode():
                    work = Work(own, cell)
                    if handle is not None:
                        rows[name].sites, rows[name].residual = watched(work, handle, direction)
                    if name == HOOKS:
                        truth = work.once().double().clone()
                        work.rewind()
                    work.prepare()
                    logits[name] = work.once().double().clone()
                    work.rewind()
                works[name] = work
            except Exception as error:
                rows[name].status = f"failed: {type(error).__name__}: {first_line(error)[:300]}"
        for name, own_logits in logits.items() if truth is not None else ():
            difference = (own_logits - truth).abs().max() / truth.abs().max()
            rows[name].logits_difference = float(difference)
        if BASE in works:
            time_them(works, rows, options)
    return list(rows.values())


def time_them(works: dict[str, Work], rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Time all methods in every round; they have run before, so no round is a warm-up."""
    cell = works[BASE].cell
    with torch.inference_mode():
        start = time.perf_counter()
        works[BASE].once().sum().item()
        once = time.perf_counter() - start
        works[BASE].rewind()
    repeats = max(1, min(MOST, round(MEASURE_S / once)))
    for work in works.values():
        work.repeats = repeats
    rounds = int(options.seconds / (once * repeats * len(works)))
    rounds = max(options.rounds, min(MOST_ROUNDS, rounds))
    tokens = cell.batch * (1 if cell.work == "decode" else cell.tokens)

    def run(name: str) -> int:
        works[name]()
        return tokens * works[name].repeats

    def enough(speeds: dict[str, Speed]) -> bool:
        found = speeds.get(FUSED)
        if found is None or len(found.ratios) < max(FEWEST, options.rounds):
            return False
        low, high = found.interval
        return (high - low) / 2 <= options.within

    contexts = {name: lambda work=work: rewound(work) for name, work in works.items()}
    speeds = interleaved(run, contexts, rounds=rounds, warmup=0, enough=enough)
    for name, speed in speeds.items():
        rows[name].speed, rows[name].repeats = speed, works[name].repeats


# --- the run -------------------------------------------------------------------------------------


def run_grid(
    options: argparse.Namespace, keep: Callable[[list[Row]], None]
) -> tuple[list[Row], bool]:
    """Measure cell by cell; return the rows, and whether it was all of them."""
    rows: list[Row] = []
    try:
        for name, dtype in product(options.models, options.dtypes):
            print(f"{name}, {dtype}: loading", flush=True)
            try:
                model = build(name, options.layers, dtype, options.device)
                direction = direction_of(model)
                size = (len(decoder_layers(model)), hidden_size(model))
            except Exception as error:
                reason = f"failed: {type(error).__name__}: {first_line(error)[:300]}"
                cell = Cell(name, options.layers or 0, 0, dtype, "every mode", "any work", 0, 0)
                rows.append(Row(cell, "every method", reason))
                continue
            works = [work for work in WORKS if work[0] in options.works]
            for mode, work in product(options.modes, works):
                cell = Cell(name, *size, dtype, mode, *work)
                start = time.perf_counter()
                rows += measure(model, direction, cell, options)
                print(f"{cell}: {time.perf_counter() - start:.0f} s", flush=True)
                keep(rows)
            del model
    except KeyboardInterrupt:
        print("\nstopped; what was measured is kept", flush=True)
        return rows, False
    return rows, True


def write(options: argparse.Namespace, rows: Sequence[Row], seconds: float, complete: bool) -> None:
    """Write the CSV and the JSON."""
    records = [row.record() for row in rows]
    document = {
        "device": describe_device(options.device),
        "versions": options.versions,
        "torch_threads": torch.get_num_threads(),
        "clock_mhz": clock_mhz(options.device),
        "seconds": round(seconds),
        "complete": complete,
        "rows": records,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"models-{options.device}.json", document)
    if records:
        write_csv(options.out / f"models-{options.device}.csv", records)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print a line a cell, then what could not be timed, and why."""
    table = Table(
        title="tokens/s over the unmodified model's (95 % interval)", title_justify="left"
    )
    table.add_column("cell")
    others = [name for name in METHODS if name != BASE]
    for name in ("tokens/s", *others, "|r.h|/|h|", "logits off", "of", "right"):
        table.add_column(name, justify="right")
    for cell in dict.fromkeys(row.cell for row in rows):
        by_method = {row.method: row for row in rows if row.cell == cell}
        base = by_method.get(BASE)
        if base is None or base.speed is None:
            continue
        mine = [by_method[name] for name in others]
        residuals = [row.residual for row in mine if row.residual is not None]
        off = [row.logits_difference for row in mine if row.logits_difference is not None]
        right = all(row.right for row in mine)
        table.add_row(
            str(cell),
            f"{base.speed.tokens_per_second:.1f}",
            *(ratio_text(row.speed) for row in mine),
            f"{max(residuals):.1e}" if residuals else "",
            f"{max(off):.1e}" if off else "",
            f"{base.logits_difference:.2f}" if base.logits_difference is not None else "",
            "yes" if right else "[bold red]NO[/bold red]",
        )
    console.print(table)
    for row in rows:
        if row.status != OK:
            text = f"no time for {row.method}: {row.status} ({row.cell})"
            console.print(text, markup=False, highlight=False)


def spread_of(speed: Speed) -> tuple[float, float]:
    """Return the 95 % interval of the median; of fewer rounds than have one, the quartiles."""
    return speed.interval if len(speed.ratios) >= FEWEST else speed.quartiles


def ratio_text(speed: Speed | None) -> str:
    """Return a ratio with its interval, of few rounds the quartiles; red where it is below 1."""
    if speed is None:
        return "none"
    low, high = spread_of(speed)
    text = f"{speed.median:.3f} ({low:.3f} to {high:.3f})"
    return f"[red]{text}[/red]" if speed.median < 1.0 else text


def plot(path: Path, rows: Sequence[Row], device: str) -> None:
    """Draw the ratios of every cell, with their intervals."""
    cells = list(dict.fromkeys(row.cell for row in rows if row.speed is not None))[::-1]
    looks = dict(zip((n for n in METHODS if n != BASE), (GREEN, BLUE, GRAY), strict=False))
    with plt.rc_context({**STYLE, "font.size": 9}):
        figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(cells)))
        for number, (name, color) in enumerate(looks.items()):
            for y, cell in enumerate(cells):
                for row in rows:
                    if (row.cell, row.method) != (cell, name) or row.speed is None:
                        continue
                    x, (low, high) = row.speed.median, spread_of(row.speed)
                    spread, label = [[x - low], [high - x]], name if y == 0 else None
                    axes.errorbar(
                        x, y + 0.2 * (1 - number), xerr=spread, fmt="o", markersize=4,
                        color=color, capsize=2, label=label,
                    )  # fmt: skip
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_yticks(range(len(cells)), [str(cell) for cell in cells])
        axes.set_xlabel("tokens/s over the unmodified model's (bars: 95 % interval)")
        axes.set_title(device, loc="left", fontsize=9)
        if cells:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.06), ncols=3)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=tuple(GRID), default="cpu")
    known = f"{', '.join(SHAPES)} (random weights), a hub id, a folder"
    parser.add_argument(
        "--models", "--model", nargs="+", default=list(SHAPES), metavar="MODEL", help=known
    )
    parser.add_argument("--layers", type=int, help="only the first so many of each model")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compile", "graph"))
    kinds = tuple(dict.fromkeys(work for work, _, _ in WORKS))
    parser.add_argument("--works", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--rounds", type=int, default=15, help="at least so many for a cell")
    parser.add_argument(
        "--within", type=float, default=0.004,
        help="and until the patched model's ratio is known to plus and minus this (95 %%)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=300, help="but no longer than this")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="on a CPU")
    parser.add_argument("--quick", action="store_true", help="2 layers, 5 rounds or 2 s")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device")
    if options.quick:
        options.layers, options.rounds, options.seconds = options.layers or 2, 5, 2.0
    if options.rounds < 2 or (options.layers is not None and options.layers < 1):
        parser.error("--rounds must be 2 or more, --layers 1 or more")
    options.dtypes = options.dtypes or GRID[options.device][0]
    options.modes = options.modes or GRID[options.device][1]
    options.versions = versions()  # now: with the commit, before what is written changes the tree
    torch.set_num_threads(options.threads)

    start = time.perf_counter()
    rows, complete = run_grid(
        options, lambda rows: write(options, rows, time.perf_counter() - start, complete=False)
    )
    write(options, rows, time.perf_counter() - start, complete)
    path = options.out / f"models-{options.device}"
    plot(path.with_suffix(".png"), rows, describe_device(options.device).split(",")[0])
    console = Console(width=None if Console().is_terminal else 200)
    print_table(rows, console)
    console.print(f"{time.perf_counter() - start:.0f} s; {path}.csv, .json, .png")
    return rows


if __name__ == "__main__":
    main()
