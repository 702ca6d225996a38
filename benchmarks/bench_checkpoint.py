"""Measures the memory and the speed of orthogonalize_checkpoint on a checkpoint of 3 GB.

    python benchmarks/bench_checkpoint.py [--out benchmarks/results/checkpoint-cpu.jsonl]

The checkpoint is random: Llama with the hidden size, width and vocabulary of an 8B model and two
layers, bfloat16, in four files. It is made in a temporary folder and removed. Each run is a process
of its own, since a peak cannot be reset: one that only imports (torch, then all that the edit
needs), and one that edits. The peak is VmHWM, the highest resident memory of the process: its own
pages, its libraries and what it maps. Files are read with read(), not mapped, so that no page of
them counts, nor is hidden from the count.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from refusal_kernels.bench.records import header, write_records
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError

LIMIT = 2.5  # times the largest tensor

CHILD = """
import json, sys, time
import torch
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
row = {"torch": peak()}
import refusal_kernels as rk
from transformers import AutoModelForCausalLM
row["imported"] = peak()
if len(sys.argv) > 1:
    direction = rk.Direction.load(sys.argv[3])
    start = time.perf_counter()
    done = rk.orthogonalize_checkpoint(sys.argv[1], sys.argv[2], direction)
    row |= {"seconds": time.perf_counter() - start, "peak": peak(), "edited": len(done.edited)}
print(json.dumps(row))
"""


def make(folder: Path, hidden: int, inner: int, vocabulary: int, layers: int) -> int:
    """Write a random Llama checkpoint, a file at a time; return its largest tensor in bytes."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    narrow = 128 * config.num_key_value_heads
    shards = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    for k in range(layers):
        name = f"model.layers.{k}."
        shards.append(
            {
                **{f"{name}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"},
                **{f"{name}self_attn.{p}_proj.weight": (narrow, hidden) for p in "kv"},
                **{f"{name}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")},
                f"{name}mlp.down_proj.weight": (hidden, inner),
                f"{name}input_layernorm.weight": (hidden,),
                f"{name}post_attention_layernorm.weight": (hidden,),
            }
        )
    shards.append({"lm_head.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)})
    weight_map, total, largest = {}, 0, 0
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
        total += sum(t.nbytes for t in tensors.values())
        largest = max(largest, *(t.nbytes for t in tensors.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return largest


def child(*arguments: Path) -> dict[str, float]:
    """Run a process of its own, and return what it says."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(hidden: int, inner: int, vocabulary: int, layers: int, where: str | None) -> dict:
    """Make a checkpoint, edit it, and return what that took."""
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        (folder / "source").mkdir()
        largest = make(folder / "source", hidden, inner, vocabulary, layers)
        size = sum(path.stat().st_size for path in (folder / "source").glob("*.safetensors"))
        direction = folder / "direction.safetensors"
        Direction(torch.randn(hidden, generator=torch.Generator().manual_seed(1))).save(direction)
        base = child()
        run = child(folder / "source", folder / "target", direction)
    over = run["peak"] - base["torch"]
    return {
        "checkpoint_bytes": size,
        "largest_tensor_bytes": largest,
        "edited": run["edited"],
        "seconds": round(run["seconds"], 2),
        "megabytes_per_second": round(size / run["seconds"] / 1e6, 1),
        "torch_bytes": base["torch"],
        "imported_bytes": base["imported"],
        "peak_bytes": run["peak"],
        "over_torch_bytes": over,
        "over_imported_bytes": run["peak"] - base["imported"],
        "ratio_over_torch": round(over / largest, 4),
        "ratio_over_imported": round((run["peak"] - base["imported"]) / largest, 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON lines")
    options = parser.parse_args()
    needed = (
        2
        * options.hidden
        * (2 * options.vocabulary + options.layers * 3 * (options.inner + options.hidden))
    )
    if shutil.disk_usage(options.folder or tempfile.gettempdir()).free < 2.5 * needed:
        raise InputError(f"the disk is too small; expected {2.5 * needed / 1e9:.0f} GB free")
    row = measure(options.hidden, options.inner, options.vocabulary, options.layers, options.folder)
    print(json.dumps(row, indent=2))
    if options.out:
        head = header("memory and time of editing a checkpoint") | {"limit": LIMIT}
        write_records(options.out, {**head, "rows": [row]})
    return int(row["ratio_over_torch"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
