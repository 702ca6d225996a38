"""Throughput of vLLM: without the plugin, with it inert, plain, ablated, a program per request.

The engines live beside each other and take turns, so that the machine's load hits all of them
alike; ratios are within a round, to the engine without the plugin.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a process for each engine
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
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


def engine(model: str, config: dict[str, Any], args: argparse.Namespace) -> LLM:
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
    without = engine(model, {}, args)
    del os.environ["VLLM_PLUGINS"]
    vllm.plugins.plugins_loaded = False  # in this process; the engine's own stays without
    inert, steered = engine(model, {}, args), engine(model, steering, args)
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

    def run(llm: LLM, names: list[str | None]) -> float:
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
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return args.batch * tokens / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1, args.rounds):
        order = list(cases)
        for name in order if number % 2 == 0 else order[::-1]:
            rate = run(*cases[name])
            if number >= 0:
                rates[name].append(rate)
    return {name: summary(rates, name) for name in cases}


def summary(rates: dict[str, list[float]], name: str) -> dict[str, Any]:
    base = ABLATED if name == EACH else BASE
    ratios = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "tokens_per_second": statistics.median(rates[name]),
        "to": base,
        "ratio": median,
        "quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
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
                low, high = one["quartiles"]
                print(
                    f"{model:5} {case:22} {one['tokens_per_second']:8.0f} tokens/s, "
                    f"{one['ratio']:.3f} [{low:.3f}, {high:.3f}] of {one['to']}",
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
