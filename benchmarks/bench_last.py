"""What a prompt's last logits cost: asked for as a number, and by position.

    python benchmarks/bench_last.py [--json benchmarks/results/last-cpu.json]

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
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.files.atomic import write_json
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
        "times": {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]},
        "logits_apart": apart,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = shapes.cut(shapes.config_of("qwen2.5-0.5b"), 6)
        model = shapes.build("qwen2.5-0.5b", config, dtype)
        found[dtype] = {f"{rows} rows": costs(model, rows, options.rounds) for rows in (1, 8)}
    document = {"versions": versions(), "device": describe_device("cpu"), "last": found}
    print(json.dumps(document, indent=2))
    if options.json:
        write_json(options.json, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
