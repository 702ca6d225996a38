"""An edit inside a graph that Inductor compiles for a CPU: the op, called, against its formula.

    python benchmarks/bench_compiled.py [--out benchmarks/results/compiled-cpu.jsonl]

A graph is a chain of edits, each reading what the last one wrote, as in a model's layers: one
direction for all tokens, as `patch` compiles it; a route over 32 of them, as in the vLLM plugin;
and that with room for four interventions in each program. All variants take turns; "none" is the
same add and norm without an edit. `refusal_kernels.ops.inductor` has its limits from here.
"""

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import Timed, interleaved, on_host, ratio, rounds_for
from torch import Tensor

from refusal_kernels.bench.records import header, write_records
from refusal_kernels.ops import inductor, reference

EDITS = 8  # in one graph
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROGRAMS = {"one": (1, 1), "routed": (32, 1), "four slots": (32, 4)}  # how many, and slots
VARIANTS = {"op": 0, "formula": 1 << 30, "none": 0}  # up to how many channels it is the formula


def plain(x: Tensor, residual: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    h = x + residual
    return reference.rms_norm(h, weight, 1e-6), h


def edited(
    x: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, params: Tensor, route: Tensor | None
) -> tuple[Tensor, Tensor]:
    op = torch.ops.refusal_kernels.add_steer_rms_norm_inference
    normed, h = op(x, residual, weight, 1e-6, bank, params, route, 0.0)
    return normed, h


def chain(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        for _ in range(EDITS):
            x, residual = step(x, residual, *rest)
        return x, residual

    # code of its own: what is compiled is kept by code, and the variants' must stay side by side
    run.__code__ = run.__code__.replace(co_name=step.__name__)
    return run


def compiled(variant: str, operands: tuple[Any, ...]) -> Callable[[], Any]:
    inductor.MOST = inductor.MOST_ROUTED = VARIANTS[variant]
    call = torch.compile(chain(plain if variant == "none" else edited), dynamic=False)
    call(*operands)
    return partial(call, *operands)


def operands_of(tokens: int, hidden: int, dtype: str, program: str) -> tuple[Any, ...]:
    programs, slots = PROGRAMS[program]
    torch.manual_seed(0)
    x, residual, weight = (
        torch.randn(*shape, dtype=DTYPES[dtype])
        for shape in ((tokens, hidden), (tokens, hidden), (hidden,))
    )
    bank, params = torch.randn(programs, 2, slots, hidden), torch.zeros(programs, slots, 5)
    bank /= bank.norm(dim=-1, keepdim=True)
    params[:, 0] = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])
    route = None if program == "one" else torch.arange(tokens, dtype=torch.int32) % programs
    return x, residual, weight, bank, params, route


def measure(tokens: int, hidden: int, dtype: str, program: str, limit_s: float) -> dict[str, Any]:
    torch._dynamo.reset()
    operands = operands_of(tokens, hidden, dtype, program)
    calls = max(1, round(200 * 128 / (tokens + hidden / 8)))
    subjects: dict[str, Timed] = {
        name: on_host(compiled(name, operands), calls) for name in VARIANTS
    }
    seconds = interleaved(subjects, rounds_for(subjects, limit_s, 11, 201), warmup=2)
    low, middle, high = ratio(seconds["formula"], seconds["op"])
    return {
        "tokens": tokens, "hidden": hidden, "dtype": dtype, "program": program,
        "rounds": len(seconds["op"]),
        **{f"{name}_us": 1e6 * statistics.median(s) / EDITS for name, s in seconds.items()},
        "formula_over_op": middle, "q1": low, "q3": high,
    }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=numbers, default=[1, 32, 512])
    parser.add_argument("--hidden", type=numbers, default=[128, 512, 2048, 4096])
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--limit", type=float, default=1.0, help="seconds for a row")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "dynamo_pgo")
    torch._inductor.config.force_disable_caches = True  # a cache does not know the variants
    console, rows = Console(width=120), []
    table = Table("dtype", "program", "hidden", "tokens", "op", "formula", "none", "formula / op")
    kinds = args.dtypes.split(","), args.programs.split(",")
    axes = itertools.product(*kinds, args.hidden, args.tokens)
    for dtype, program, hidden, tokens in axes:
        row = measure(tokens, hidden, dtype, program, args.limit)
        rows.append(row)
        times = [f"{row[f'{name}_us']:.1f} us" for name in VARIANTS]
        spread = f"{row['formula_over_op']:.2f} [{row['q1']:.2f}, {row['q3']:.2f}]"
        table.add_row(dtype, program, str(hidden), str(tokens), *times, spread)
        console.print(dtype, program, hidden, tokens, *times, spread, highlight=False)
    console.print(table)
    if args.out is not None:
        head = header("us an edit in a graph of eight, compiled by Inductor for a CPU")
        write_records(args.out, {**head, "torch_threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    main()
