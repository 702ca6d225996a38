"""Throughput of vLLM: without the plugin, with it inert, plain, ablated, a program per request.

The engines live beside each other and take turns, so that the machine's load hits all of them
alike; ratios are within a round, to the engine without the plugin. Beside the rate, the processor
time of the engine's process is taken, which a busy machine disturbs less: what a step costs.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a process for each engine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# a core is left to the front end, as vLLM does where it binds threads itself
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import vllm.plugins
from vllm import LLM, SamplingParams

import refusal_kernels as rk
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.files import write_json
from refusal_kernels.toy import PATH

PROMPT = 16  # tokens
BASE, ABLATED, EACH = "no plugin", "all ablated", "one program each"
# Qwen2.5-0.5B's shape, and how many of its 24 layers: ratios do not depend on that
HALF_BILLION = {
    **{"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14},
    **{"num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 512},
}


def random_model(folder: Path, layers: int) -> str:
    config = transformers.Qwen2Config(**HALF_BILLION, num_hidden_layers=layers)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def longest(model: str) -> int:
    return min(256, transformers.AutoConfig.from_pretrained(model).max_position_embeddings)


class Engine:
    """An engine in a process of its own."""

    def __init__(self, model: str, config: dict[str, Any], args: argparse.Namespace) -> None:
        before = set(multiprocessing.active_children())
        self.llm = start(model, config, args)
        (self.process,) = set(multiprocessing.active_children()) - before

    def seconds(self) -> float:
        """Processor time of the engine's process and those that it started."""
        return sum(map(processor_seconds, processes(self.process.pid)))


def processes(root: int) -> list[int]:
    children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    return [root, *(below for child in children for below in processes(int(child)))]


def processor_seconds(process: int) -> float:
    return time.clock_gettime((~process << 3) | 2)  # as clock_getcpuclockid(3) makes it


def start(model: str, config: dict[str, Any], args: argparse.Namespace) -> LLM:
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=args.eager,
        max_model_len=longest(model),
        max_num_seqs=args.batch,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        additional_config=config,
    )


def measure(model: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    hidden = transformers.AutoConfig.from_pretrained(model).hidden_size
    directions, programs = {}, {}
    for k in range(args.batch):
        directions[str(k)] = str(folder / f"{k}.safetensors")
        rk.Direction(torch.randn(hidden)).save(directions[str(k)])
        programs[str(k)] = {"ablate": str(k)}
    steering = {"refusal_kernels": {"directions": directions, "programs": programs}}
    os.environ["VLLM_PLUGINS"] = ""
    without = Engine(model, {}, args)
    del os.environ["VLLM_PLUGINS"]
    vllm.plugins.plugins_loaded = False  # in this process; the engine's own stays without
    inert, steered = Engine(model, {}, args), Engine(model, steering, args)
    cases = {
        BASE: (without, [None] * args.batch),
        "the same again": (without, [None] * args.batch),
        "plugin inert": (inert, [None] * args.batch),
        "plain requests": (steered, [None] * args.batch),
        ABLATED: (steered, ["0"] * args.batch),
        EACH: (steered, [str(k) for k in range(args.batch)]),
    }
    tokens = min(args.tokens, longest(model) - PROMPT)  # the toy has 128 positions
    prompts = [{"prompt_token_ids": torch.randint(3, 200, (PROMPT,)).tolist()} for _ in programs]

    def run(engine: Engine, names: list[str | None]) -> tuple[float, float]:
        """Return tokens a second, and milliseconds of the engine's processor a step."""
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if name is None else {"steer": name},
            )
            for name in names
        ]
        spent, began = engine.seconds(), time.perf_counter()
        engine.llm.generate(prompts, params, use_tqdm=False)
        ended, spent = time.perf_counter(), engine.seconds() - spent
        return args.batch * tokens / (ended - began), 1e3 * spent / tokens

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    # the runs of the toy are ten times shorter, and so the more disturbed
    for number in range(-1, args.rounds * (3 if model == str(PATH) else 1)):
        order = list(cases)
        for name in order if number % 2 == 0 else order[::-1]:
            one = run(*cases[name])
            if number >= 0:
                found[name].append(one)
    return {name: summary(found, name) for name in cases}


def summary(found: dict[str, list[tuple[float, float]]], name: str) -> dict[str, Any]:
    base = ABLATED if name == EACH else BASE
    pairs = list(zip(found[name], found[base], strict=True))
    rate = quartiles([own[0] / its[0] for own, its in pairs])
    processor = quartiles([its[1] / own[1] for own, its in pairs])
    return {
        "to": base,
        "tokens_per_second": statistics.median(one[0] for one in found[name]),
        "ratio": rate[1],
        "quartiles": [rate[0], rate[2]],
        "processor_ms_per_step": statistics.median(one[1] for one in found[name]),
        "processor_ratio": processor[1],  # above 1: less processor time than the base
        "processor_quartiles": [processor[0], processor[2]],
        "more_ms_per_step": statistics.median(own[1] - its[1] for own, its in pairs),
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--models", default="toy,0.5B")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in args.models.split(","):
            path = str(PATH) if model == "toy" else random_model(folder / "model", args.layers)
            found[model] = measure(path, folder, args)
            for case, one in found[model].items():
                spread, busy = one["quartiles"], one["processor_quartiles"]
                step, more = one["processor_ms_per_step"], one["more_ms_per_step"]
                print(
                    f"{model:5} {case:17} {one['tokens_per_second']:6.0f} tokens/s, "
                    f"{one['ratio']:.3f} [{spread[0]:.3f}, {spread[1]:.3f}] of {one['to']}; by "
                    f"processor {one['processor_ratio']:.3f} [{busy[0]:.3f}, {busy[1]:.3f}], "
                    f"{step:.2f} ms a step ({more:+.3f})",
                    flush=True,
                )
    if args.out is not None:
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        document = {
            "what": "vLLM throughput, interleaved",
            "settings": settings,
            "results": found,
            "device": describe_device(),
            "versions": {**versions(), "vllm": vllm.__version__},
        }
        write_json(args.out, document)


if __name__ == "__main__":
    main()
