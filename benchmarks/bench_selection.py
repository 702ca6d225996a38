"""Extraction and selection on SmolLM2 beside the protocol written out plainly: processor time.

    python benchmarks/bench_selection.py [--out benchmarks/results/selection-smollm2-cpu.jsonl]

The plain implementation is that of the tests (`tests/research/selection/protocol.py`), as the
paper's code: hooks, one candidate after the other, three whole passes each, batches of 32 prompts
padded on the left, all logits. Both run in float32 on one thread, in every round, every other round
in reverse order; a ratio is that of one round. It is of the processor time of the process, which
other processes on the machine change little. Memory is what a run adds to what was in use. Scores
and mean differences are compared too.

Extraction: `--train` prompts of each class. Selection: `--prompts` of each class; candidates at all
positions of two layers, whose mean is that of the layers which the paper's filter leaves.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import ratio

import refusal_kernels as rk
from refusal_kernels import smollm2
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.bench.worker.observe import MemoryMark
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.timing import in_turns

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "research" / "selection"))
from protocol import last_logits, mean_difference, measure

LAYERS = (7, 17)
REFUSAL_TOKENS = [57]  # "I"
BARS = {"extraction": 2.0, "selection": 3.0}  # times less processor time than the plain protocol
APART = {"extraction": 1e-4, "selection": 5e-5}  # of a candidate's norm; of a score


def prompts(split: str, count: int) -> dict[str, list[str]]:
    return {name: smollm2.prompts(name, split)[:count] for name in smollm2.CATEGORIES}


def extraction(model: Any, tokenizer: Any, train: dict[str, list[str]]) -> dict[str, Any]:
    """Both ways to extract, each returns [position, layer, hidden]."""
    positions = ChatFormat(tokenizer).positions
    return {
        "ours": lambda: rk.mean_difference(model, tokenizer, **train).vectors,
        "plain": lambda: mean_difference(model, tokenizer, **train, positions=positions),
    }


def selection(
    model: Any, tokenizer: Any, vectors: torch.Tensor, validation: dict[str, list[str]]
) -> dict[str, Any]:
    """Both ways to select, each returns bypass, induce and KL: [candidates, 3]."""
    chosen = torch.zeros_like(vectors)  # `select` leaves candidates that are zero out
    chosen[:, list(LAYERS)] = vectors[:, list(LAYERS)]

    def ours() -> torch.Tensor:
        found = rk.select(
            model, tokenizer, rk.Candidates(chosen), **validation, refusal_tokens=REFUSAL_TOKENS,
            kl_threshold=torch.inf, induce_threshold=-torch.inf,
        )  # fmt: skip
        rows = [row for row in found.candidates if row.kl is not None]
        return torch.tensor([(row.bypass, row.induce, row.kl) for row in rows])

    def plain() -> torch.Tensor:
        table = measure(
            model, tokenizer, vectors, **validation, tokens=REFUSAL_TOKENS, layers=LAYERS
        )
        return torch.tensor(list(table.values()))

    return {"ours": ours, "plain": plain}


def compare(
    subjects: dict[str, Callable[[], torch.Tensor]], rounds: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Time both in turns; return the numbers, and what each has computed."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    memory: dict[str, float] = {}
    results: dict[str, torch.Tensor] = {}
    for _, order in in_turns(subjects, rounds, warmup=0):
        for name in order:
            mark, start = MemoryMark("cpu"), time.process_time()
            results[name] = subjects[name]()
            seconds[name].append(time.process_time() - start)
            memory[name] = max(memory.get(name, 0.0), mark.grown() or 0.0)
        print(*(f"{name} {times[-1]:.1f} s" for name, times in seconds.items()), sep=", ")
    low, middle, high = ratio(seconds["plain"], seconds["ours"])
    row = {
        "times_less": middle,
        "q1": low,
        "q3": high,
        "cpu_seconds": statistics.median(seconds["ours"]),
        "plain_cpu_seconds": statistics.median(seconds["plain"]),
        "memory_mib": memory["ours"],
        "plain_memory_mib": memory["plain"],
        "rounds": rounds,
    }
    return row, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32, help="of each class, for selection")
    parser.add_argument("--train", type=int, default=64, help="of each class, for extraction")
    parser.add_argument("--rounds", type=int, default=2, help="two at least")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = rk.load("smollm2", "cpu")
    facts = {"model": "SmolLM2-135M-Instruct", "train": options.train, "prompts": options.prompts}

    last_logits(model, tokenizer, ["Hello"], 1)  # the weights are in memory from here on
    rows = []
    row, found = compare(
        extraction(model, tokenizer, prompts("train", options.train)), options.rounds
    )
    norms = found["plain"][:, 1:].norm(dim=-1)  # at layer 0 there is no difference
    apart = (found["ours"] - found["plain"]).norm(dim=-1)[:, 1:] / norms
    rows.append({"what": "extraction", **row, "largest_difference": float(apart.max())})

    vectors = found["ours"]
    subjects = selection(model, tokenizer, vectors, prompts("validation", options.prompts))
    row, found = compare(subjects, options.rounds)
    apart = (found["ours"] - found["plain"]).abs()
    row = {**row, "candidates": len(apart), "largest_difference": float(apart.max())}
    rows.append({"what": "selection", **row})

    print(json.dumps([facts, *rows], indent=2))
    if options.out:
        head = header("extraction and selection, over the protocol written out plainly")
        write_records(options.out, {**head, **facts, "rows": rows})
    met = all(
        row["times_less"] >= BARS[row["what"]] and row["largest_difference"] <= APART[row["what"]]
        for row in rows
    )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
