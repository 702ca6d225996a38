"""What the plugin's hooks take of the host in a step of vLLM's Model Runner V2.

The engine is real and its model tiny; on a CPU its kernels are interpreted. Only the processor time
inside the hooks counts; they wait for nothing. Every request has a strength of its own. Each hook
runs three times: first as in the step, which on a CPU is after the interpreter has filled the
caches; then with the same batch again, as in most steps of decoding; then as if the batch were
another, whose route is written. On a CPU vLLM takes V2 with ``PYTHONPATH=tests/vllm/triton_shim``.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker in this process
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import transformers
import vllm
from vllm import LLM, SamplingParams

import refusal_kernels as rk
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.vllm import worker_hooks
from refusal_kernels.vllm.names import STATE

BARS = {1: 50.0, 32: 200.0, 256: 800.0}  # requests: microseconds a step
HIDDEN, VOCABULARY, PROMPT = 64, 256, 4
FIRST, REPEATED, CHANGED = "first", "repeated", "changed"
spent = {FIRST: 0.0, REPEATED: 0.0, CHANGED: 0.0}  # microseconds in the hooks since the step began


def timed(action: Any) -> Any:
    def run(runner: Any, *args: Any, **kwargs: Any) -> None:
        for case in spent:
            if case == CHANGED:
                router = getattr(runner, STATE).router
                for req_id, steering in list(router.steering.items())[:1]:
                    router.learn(req_id, steering)  # the last batch is then forgotten
            began = time.thread_time()
            action(runner, *args, **kwargs)
            spent[case] += 1e6 * (time.thread_time() - began)

    return run


def start(folder: Path, requests: int) -> LLM:
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    rk.Direction(torch.randn(HIDDEN)).save(folder / "r.safetensors")
    llm = LLM(
        model=str(folder / "model"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=requests,
        max_num_batched_tokens=1024,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=256 << 20,
        dtype="float32",
        additional_config={
            "refusal_kernels": {
                "directions": {"r": str(folder / "r.safetensors")},
                "programs": {"ablate": {"ablate": "r"}},
            }
        },
    )
    if not llm.llm_engine.vllm_config.use_v2_model_runner:
        raise SystemExit("vLLM takes model runner V1; see the top of this file")
    return llm


def measure(llm: LLM, requests: int, steps: int) -> list[dict[str, float]]:
    """Return microseconds in the hooks, of each step."""
    engine, generator = llm.llm_engine, torch.Generator().manual_seed(0)
    for k in range(requests):
        prompt = torch.randint(3, VOCABULARY, (PROMPT,), generator=generator).tolist()
        params = SamplingParams(
            temperature=0,
            max_tokens=steps,
            ignore_eos=True,
            detokenize=False,
            extra_args={"steer": "ablate", "steer_strength": 1.0 - k / (2 * requests)},
        )
        engine.add_request(str(k), {"prompt_token_ids": prompt}, params)
    readings = []
    while engine.has_unfinished_requests():
        spent.update(dict.fromkeys(spent, 0.0))
        engine.step()
        if spent[FIRST]:
            readings.append(dict(spent))
    return readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    worker_hooks.V2_HOOKS = tuple(
        hook._replace(action=timed(hook.action)) for hook in worker_hooks.V2_HOOKS
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        llm = start(Path(name), max(BARS))
        for requests, bar in BARS.items():
            measure(llm, requests, 2)
            readings = measure(llm, requests, args.steps)
            medians = {case: statistics.median(r[case] for r in readings) for case in spent}
            rows.append({"requests": requests, "steps": len(readings), **medians, "bar": bar})
            print(
                f"{requests:4} requests, microseconds a step in the hooks: {medians[REPEATED]:.0f} "
                f"for the same batch again, {medians[CHANGED]:.0f} for another (bar {bar:.0f}); "
                f"{medians[FIRST]:.0f} with cold caches",
                flush=True,
            )
    if args.out is not None:
        head = header("vLLM hooks, host time per step")
        head["versions"]["vllm"] = vllm.__version__
        write_records(args.out, {**head, "settings": {"steps": args.steps}, "rows": rows})


if __name__ == "__main__":
    main()
