"""What collecting costs: over the bare forward passes, in memory, and for its checkpoints.

    python benchmarks/bench_collect.py [--out benchmarks/results/collect-cpu.jsonl]

Over the same batches, all in every round, every other round in reverse order:

bare     the whole forward pass of the decoder: no hook, every layer
cut      the pass that collecting makes, which ends before the last layer, reading nothing
collect  `rk.collect` as it is: the pass, the moments, the merging; prompts tokenized before
kept     the same with a checkpoint: once the identity of the run, then a file after every batch
save     the writing of these files alone

Two models: the toy model with its own prompts, and a random Llama of hidden size 896 and 6 layers
with prompts of about 64 tokens. A ratio is that of one round; medians and quartiles over the
rounds. What tokenizing costs stands beside it: it is no part of the passes.

Memory: a process of its own for every number of prompts, since a peak cannot be reset; VmHWM, the
highest resident memory: once the model and the prompts, which the caller holds, are there and a
first batch has run (loaded), and at the end. The growth is that of what collecting adds to it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, ratio
from transformers import LlamaConfig, LlamaForCausalLM

from refusal_kernels import collect, toy
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.hf.batches import Batches
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.forward import model_inputs, read_inputs
from refusal_kernels.hf.load import load
from refusal_kernels.hf.model import decoder

LIMIT = 1.05  # what collecting may take, over the bare passes
ROUNDS = 31
PAIRS = (("collect", "bare"), ("kept", "bare"), ("save", "bare"), ("collect", "cut"))
COUNTS = (1_000, 20_000)
MEMORY_LIMIT = 2 << 20  # bytes: the tokens of 19,000 more prompts, of 4 bytes each, are 1.3 MB

CHILD = """
import json, sys, time
import torch
import refusal_kernels as rk
from refusal_kernels import toy
from refusal_kernels.hf.load import load
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
model, tokenizer = load("toy", "cpu", "auto")
base = toy.prompts("harmful", "train") + toy.prompts("harmless", "train")
count = int(sys.argv[1])
prompts = [base[i % len(base)] + " " * (i // len(base)) for i in range(count)]  # all are different
rk.collect(model, tokenizer, prompts[:64])
loaded, start = peak(), time.perf_counter()
rk.collect(model, tokenizer, prompts)
seconds = time.perf_counter() - start
print(json.dumps({"loaded_bytes": loaded, "peak_bytes": peak(), "seconds": round(seconds, 2)}))
"""


class Ready(ChatFormat):
    """The chat format of prompts that are tokenized already."""

    def __init__(self, batches: Batches, positions: int) -> None:
        self.made, self.positions = batches, positions

    def stream(self, prompts: Any, batch_size: int) -> Batches:
        """Return them, whatever is asked for."""
        return self.made


def middle_model() -> Any:
    """Return a random Llama, mid-size, with few layers: the ratios do not depend on how many."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=896,
        intermediate_size=2432,
        num_hidden_layers=6,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=4096,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def middle_batches(count: int, batch_size: int) -> Batches:
    """Prompts of 48 to 80 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(48, 81, (count,), generator=generator).tolist()
    made = [torch.randint(3, 4096, (n,), generator=generator).tolist() for n in lengths]
    return Batches(made, 0, batch_size)


def costs(model: Any, batches: Batches, positions: int, rounds: int, folder: Path) -> dict:
    """Time the four over the same batches."""
    made, chat, device = list(batches), Ready(batches, positions), torch.device("cpu")
    layers, state = model.config.num_hidden_layers, folder / "state.safetensors"

    @torch.inference_mode()
    def bare() -> None:
        for batch in made:
            decoder(model)(**model_inputs(batch, device), use_cache=False)

    def cut() -> None:
        for batch in made:
            read_inputs(model, batch, layers - 1, lambda layer, stream: None)

    def whole() -> None:
        collect(model, chat, [])

    def kept() -> None:
        state.unlink(missing_ok=True)
        collect(model, chat, [], checkpoint=state)

    def timed(call: Callable[[], None]) -> Callable[[], Callable[[], float]]:
        def reading() -> Callable[[], float]:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return lambda: seconds

        return reading

    moments = collect(model, chat, [])

    def save() -> None:
        for _ in made:
            moments.save(state)

    subjects = {"bare": bare, "cut": cut, "collect": whole, "kept": kept, "save": save}
    seconds = interleaved({k: timed(call) for k, call in subjects.items()}, rounds, 2)
    row: dict[str, Any] = {
        "prompts": batches.prompts,
        "batches": len(made),
        "tokens": len(batches.tokens),
        "ms_per_batch": {
            k: round(1e3 * statistics.median(s) / len(made), 3) for k, s in seconds.items()
        },
    }
    for name, base in PAIRS:
        quartiles = [round(x, 4) for x in ratio(seconds[name], seconds[base])]
        row[f"{name}_over_{base}"] = dict(zip(("q1", "median", "q3"), quartiles, strict=True))
    return row


def memory(count: int) -> dict:
    """Collect in a process of its own."""
    command = [sys.executable, "-c", CHILD, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    model, tokenizer = load("toy", "cpu", "auto")
    chat, prompts = ChatFormat(tokenizer), list(toy.prompts("harmful", "train"))
    start = time.perf_counter()
    batches = chat.stream(prompts, 32)
    tokenizing = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        small = costs(model, batches, chat.positions, options.rounds, Path(folder))
        middle = costs(middle_model(), middle_batches(16, 8), 5, options.rounds // 2, Path(folder))
    small["tokenizing_ms_per_batch"] = round(1e3 * tokenizing / len(batches), 3)
    peaks = [{"model": "toy", "prompts": count, **memory(count)} for count in COUNTS]
    few, many = (p["peak_bytes"] - p["loaded_bytes"] for p in peaks)
    growth = many - few
    times = [{"model": "toy", **small}, {"model": "llama-896x6", **middle}]
    limits = {"limit": LIMIT, "growth_bytes": growth, "growth_limit_bytes": MEMORY_LIMIT}
    print(json.dumps([*times, *peaks, limits], indent=2))
    if options.out:
        head = header("what collecting adds to the forward passes, in time and memory")
        write_records(options.out, {**head, **limits, "rows": [*times, *peaks]})
    slow = max(row["collect_over_bare"]["median"] for row in times)
    return int(slow > LIMIT or growth > MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
