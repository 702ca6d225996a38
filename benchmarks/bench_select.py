"""Measures how much faster `select` is than the protocol written out plainly, on the toy model.

    python benchmarks/bench_select.py [--out benchmarks/results/select-cpu.jsonl]

The plain implementation is that of the tests (`tests/research/selection/protocol.py`): the paper's
hooks, one candidate after the other, batches of 32 prompts padded on the left, whole passes. It
runs in float64, which is what `select` is compared with, and in float32, which is what `select`
runs in. All run in every round, every other round in reverse order; a ratio is that of one round.
The scores are compared too.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import ratio

from refusal_kernels import mean_difference, select, toy
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.hf.load import load
from refusal_kernels.timing import in_turns

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "research" / "selection"))
from protocol import Table, measure, winner

BAR = 5.0  # times faster than the plain implementation in float64
FAST = "select"


def subjects(prompts: int) -> tuple[dict[str, Callable[[], Table]], int]:
    """Everything that is timed, each returns its table of scores; and the number of layers."""
    model, tokenizer = load("toy", "cpu", "auto")
    wide = copy.deepcopy(model).double()
    train, validation = (
        {name: toy.prompts(name, split)[:count] for name in ("harmful", "harmless")}
        for split, count in (("train", 128), ("validation", prompts))
    )
    candidates = mean_difference(model, tokenizer, **train)
    tokens = select(model, tokenizer, candidates, **validation).refusal_tokens

    def fast() -> Table:
        chosen = select(model, tokenizer, candidates, **validation, refusal_tokens=tokens)
        return {
            (row.position, row.layer): (row.bypass, row.induce, row.kl) for row in chosen.candidates
        }

    def plain(model: Any) -> Callable[[], Table]:
        return lambda: measure(model, tokenizer, candidates.vectors, **validation, tokens=tokens)

    every = {"plain float64": plain(wide), "plain float32": plain(model), FAST: fast}
    return every, model.config.num_hidden_layers


def compared(fast: Table, plain: Table, layers: int) -> dict[str, Any]:
    """How far the scores are apart, of all candidates that `select` measures."""
    measured = {at: scores for at, scores in fast.items() if None not in scores}
    apart = [
        abs(a - b)
        for at, scores in measured.items()
        for a, b in zip(scores, plain[at], strict=True)
    ]
    chosen = winner({at: plain[at]._make(scores) for at, scores in measured.items()}, layers)
    return {
        "candidates": len(plain),
        "measured": len(measured),
        "largest_difference": max(apart),
        "same_winner": chosen == winner(plain, layers),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompts", type=int, default=72, help="of each class; 72 is all there are"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    every, layers = subjects(options.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    tables: dict[str, Table] = {}
    for _, order in in_turns(every, options.rounds, warmup=0):
        for name in order:
            start = time.perf_counter()
            tables[name] = every[name]()
            seconds[name].append(time.perf_counter() - start)
        print(*(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), sep=", ")

    facts = compared(tables[FAST], tables["plain float64"], layers)
    facts = {"prompts": options.prompts, "bar": BAR, **facts}
    rows = []
    for name in ("plain float64", "plain float32"):
        low, middle, high = ratio(seconds[name], seconds[FAST])
        rows.append(
            {
                "over": name,
                "times_faster": middle,
                "q1": low,
                "q3": high,
                "seconds": statistics.median(seconds[FAST]),
                "over_seconds": statistics.median(seconds[name]),
                "rounds": options.rounds,
            }
        )
    print(json.dumps([facts, *rows], indent=2))
    if options.out:
        head = header("the time of select, over the protocol written out plainly")
        write_records(options.out, {**head, **facts, "rows": rows})
    met = rows[0]["times_faster"] >= BAR
    return int(not (met and facts["same_winner"] and facts["largest_difference"] <= 1e-4))


if __name__ == "__main__":
    sys.exit(main())
