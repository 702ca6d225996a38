"""Measures how much faster `select` is than the protocol written out plainly, on the toy model.

    python benchmarks/bench_select.py [--json benchmarks/results/select-cpu.json]

The plain implementation is that of the tests (`tests/protocol.py`): the paper's hooks, one
candidate after the other, batches of 32 prompts padded on the left, whole passes. It runs in
float64, which is what `select` is compared with, and in float32, which is what `select` runs in.
All run in every round, every other round in reverse order; a ratio is that of one round. The scores
are compared too: a fast selection of something else is worth nothing.
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

from refusal_kernels import mean_difference, select, toy
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.files.atomic import write_json
from refusal_kernels.hf.load import load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
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
        found = select(model, tokenizer, candidates, **validation, refusal_tokens=tokens)
        return {(row.position, row.layer): (row.bypass, row.induce, row.kl) for row in found.scores}

    def plain(own: Any) -> Callable[[], Table]:
        return lambda: measure(own, tokenizer, candidates, **validation, tokens=tokens)

    every = {"plain float64": plain(wide), "plain float32": plain(model), FAST: fast}
    return every, model.config.num_hidden_layers


def compared(fast: Table, plain: Table, layers: int) -> dict[str, Any]:
    """How far the scores are apart, of all candidates that `select` measures."""
    measured = {at: found for at, found in fast.items() if None not in found}
    apart = [
        abs(a - b) for at, found in measured.items() for a, b in zip(found, plain[at], strict=True)
    ]
    chosen = winner({at: plain[at]._make(found) for at, found in measured.items()}, layers)
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
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    every, layers = subjects(options.prompts)
    seconds: dict[str, list[float]] = {name: [] for name in every}
    tables: dict[str, Table] = {}
    for number in range(options.rounds):
        for name in list(every)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            tables[name] = every[name]()
            seconds[name].append(time.perf_counter() - start)
        print(*(f"{name} {own[-1]:.2f} s" for name, own in seconds.items()), sep=", ")

    found: dict[str, Any] = {
        "prompts": options.prompts,
        "rounds": options.rounds,
        "bar": BAR,
        "seconds": {name: round(statistics.median(own), 3) for name, own in seconds.items()},
        "times_faster_than": {},
        **compared(tables[FAST], tables["plain float64"], layers),
    }
    for name in ("plain float64", "plain float32"):
        ratios = [a / b for a, b in zip(seconds[name], seconds[FAST], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found["times_faster_than"][name] = {
            "median": round(middle, 2),
            "quartiles": [round(low, 2), round(high, 2)],
        }
    document = {"versions": versions(), "device": describe_device("cpu"), "select": found}
    print(json.dumps(document, indent=2))
    if options.json:
        write_json(options.json, document)
    met = found["times_faster_than"]["plain float64"]["median"] >= BAR
    return int(not (met and found["same_winner"] and found["largest_difference"] <= 1e-4))


if __name__ == "__main__":
    sys.exit(main())
