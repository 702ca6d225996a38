"""What a prompt's last logits cost: asked for as a number, and by position.

    python benchmarks/bench_last.py [--out benchmarks/results/last-cpu.jsonl]

number    `logits_to_keep=1`: the model slices, and of what is not contiguous `linear` makes a
          batched product, for which PyTorch copies the head's weights for every row
position  `logits_to_keep=LAST`, as this package asks

A random model at the shape of Qwen2.5-0.5B, of 6 layers; prompts of 64 tokens. Both in every
round, every other round in reverse order; the median ratio with its quartiles.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, ratio

from refusal_kernels.bench import shapes
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.hf.forward import LAST

TOKENS = 64
ROUNDS = 9
WAYS = {"number": 1, "position": LAST}


def costs(model: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of a forward pass both ways, and how far the logits are apart."""
    ids = (torch.arange(rows * TOKENS) * 7919 % model.config.vocab_size).view(rows, TOKENS)

    def logits(keep: Any) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, -1].double()

    def timed(keep: Any) -> Any:
        def run() -> Any:
            start = time.perf_counter()
            logits(keep)
            seconds = time.perf_counter() - start
            return lambda: seconds

        return run

    with torch.inference_mode():
        apart = float((logits(1) - logits(LAST)).abs().max())
        seconds = interleaved({name: timed(keep) for name, keep in WAYS.items()}, rounds, 1)
    low, middle, high = ratio(seconds["number"], seconds["position"])
    return {
        "seconds": {name: round(statistics.median(s), 4) for name, s in seconds.items()},
        "times": middle,
        "times_q1": low,
        "times_q3": high,
        "logits_apart": apart,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        config = shapes.cut(shapes.config_of("qwen2.5-0.5b"), 6)
        model = shapes.build("qwen2.5-0.5b", config, dtype)
        for batch in (1, 8):
            rows.append({"dtype": dtype, "batch": batch, **costs(model, batch, options.rounds)})
    print(json.dumps(rows, indent=2))
    if options.out:
        what = "the time of a prompt's last logits, asked for as a number, over that by position"
        write_records(options.out, {**header(what), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
