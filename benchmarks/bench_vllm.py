"""Throughput of vLLM: without the plugin, with it inert, plain, ablated, a program per request.

Every engine is one process, with its scheduler and its model. The engines take turns, so that the
machine's load hits all of them alike. A ratio compares an engine with the one without the plugin,
in the same round. Two engines that were started alike differ in speed, so all of them are started
several times. A second engine without the plugin shows how much of that difference remains. The
processor time of a step is printed beside the rate.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler beside the model
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# a core is left over, as vLLM does where it binds threads itself
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
import vllm
from vllm import LLM, SamplingParams

import refusal_kernels as rk
from refusal_kernels import _C
from refusal_kernels.bench.records import header, write_records
from refusal_kernels.timing import in_turns
from refusal_kernels.toy import PATH

PROMPT = 16  # tokens
BASE, ANOTHER, INERT = "no plugin", "another without", "plugin inert"
PLAIN, ABLATED, EACH = "plain requests", "all ablated", "one program each"
Programs = list[str | None]  # of the requests of a batch
spawning = multiprocessing.get_context("spawn")
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

    def __init__(
        self, model: str, config: dict[str, Any], args: argparse.Namespace, plugin: bool = True
    ) -> None:
        self.pipe, its = spawning.Pipe()
        given = its, model, config, args, plugin
        # a daemon: when one engine cannot start, none of the others is waited for
        self.process = spawning.Process(target=serve, args=given, daemon=True)
        self.process.start()
        its.close()
        self.pipe.recv()  # it has started, or EOFError: it could not

    def run(self, programs: Programs, tokens: int) -> tuple[float, float]:
        """Return tokens a second, and milliseconds of processor time a step."""
        self.pipe.send((programs, tokens))
        took, spent = self.pipe.recv()
        return len(programs) * tokens / took, 1e3 * spent / tokens

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(
    pipe: Connection, model: str, config: dict[str, Any], args: argparse.Namespace, plugin: bool
) -> None:
    if not plugin:
        os.environ["VLLM_PLUGINS"] = ""
    llm = start(model, config, args)
    torch.manual_seed(1)
    prompts: Any = [
        {"prompt_token_ids": torch.randint(3, 200, (PROMPT,)).tolist()} for _ in range(args.batch)
    ]
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        programs, tokens = asked
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if program is None else {"steer": program},
            )
            for program in programs
        ]
        spent, began = time.process_time(), time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        pipe.send((time.perf_counter() - began, time.process_time() - spent))


def start(model: str, config: dict[str, Any], args: argparse.Namespace) -> LLM:
    return LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        enforce_eager=args.eager,
        max_model_len=longest(model),
        max_num_seqs=args.batch,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        additional_config=config,
    )


def write_programs(model: str, folder: Path, number: int) -> dict[str, Any]:
    """Return a configuration of `number` programs, each with a random direction of its own."""
    hidden = transformers.AutoConfig.from_pretrained(model).hidden_size
    directions, programs = {}, {}
    for k in range(number):
        directions[str(k)] = str(folder / f"{k}.safetensors")
        rk.Direction(torch.randn(hidden)).save(directions[str(k)])
        programs[str(k)] = {"ablate": str(k)}
    return {"refusal_kernels": {"directions": directions, "programs": programs}}


def start_all(model: str, steering: dict[str, Any], args: argparse.Namespace) -> dict[str, Engine]:
    engines = {case: Engine(model, {}, args, plugin=False) for case in (BASE, ANOTHER)}
    engines[INERT] = Engine(model, {}, args)
    engines[PLAIN] = engines[ABLATED] = engines[EACH] = Engine(model, steering, args)
    return engines


# tokens a second, and milliseconds of processor time a step; a list for each start
Readings = dict[str, list[list[tuple[float, float]]]]


def measure(model: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    steering = write_programs(model, folder, args.batch)
    tokens = min(args.tokens, longest(model) - PROMPT)  # the toy has 128 positions
    starts, rounds = args.starts, args.rounds
    if model != str(PATH):  # its batch takes ten times as long as the toy's; noise hits it less
        starts, rounds = (starts + 1) // 2, (rounds + 2) // 3
    plain: Programs = [None] * args.batch
    programs = dict.fromkeys((BASE, ANOTHER, INERT, PLAIN), plain)
    programs |= {ABLATED: ["0"] * args.batch, EACH: [str(k) for k in range(args.batch)]}
    readings: Readings = {case: [] for case in programs}
    for _ in range(starts):
        engines = start_all(model, steering, args)
        for case in programs:
            readings[case].append([])
            engines[case].run(programs[case], tokens)
        for _, order in in_turns(programs, rounds, warmup=0):
            for case in order:
                engines[case].run(programs[case], 8)  # the caches hold the last engine's
                readings[case][-1].append(engines[case].run(programs[case], tokens))
        for engine in set(engines.values()):
            engine.stop()
        last = {
            case: statistics.median(rate for rate, _ in one[-1]) for case, one in readings.items()
        }
        print(
            f"a start: {', '.join(f'{case} {rate:.0f}' for case, rate in last.items())}", flush=True
        )
    return [summary(readings, case) for case in readings]


def summary(readings: Readings, case: str) -> dict[str, Any]:
    base = ABLATED if case == EACH else BASE
    starts = [
        list(zip(*both, strict=True)) for both in zip(readings[case], readings[base], strict=True)
    ]
    pairs = [pair for start in starts for pair in start]
    rate = quartiles([here[0] / there[0] for here, there in pairs])
    processor = quartiles([there[1] / here[1] for here, there in pairs])
    return {
        "case": case,
        "over": base,
        "tokens_per_second": statistics.median(here[0] for here, _ in pairs),
        "ratio": rate[1],
        "ratio_q1": rate[0],
        "ratio_q3": rate[2],
        "ratio_of_each_start": [
            statistics.median(here[0] / there[0] for here, there in start) for start in starts
        ],
        "processor_ms_per_step": statistics.median(here[1] for here, _ in pairs),
        "processor_ratio": processor[1],  # above 1: less processor time than the base
        "processor_q1": processor[0],
        "processor_q3": processor[2],
        "more_ms_per_step": statistics.median(here[1] - there[1] for here, there in pairs),
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    # a processor without AVX-512 emulates bfloat16: the toy takes 2.6 times as long
    fast = "avx512" in _C.cpu_capabilities() or torch.cuda.is_available()
    parser.add_argument("--dtype", default="bfloat16" if fast else "float32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--models", default="toy,0.5B")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.starts < 1 or args.rounds < 4:
        parser.error("expected --starts of 1 or more, --rounds of 4 or more")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in args.models.split(","):
            path = str(PATH) if model == "toy" else random_model(folder / "model", args.layers)
            for row in measure(path, folder, args):
                rows.append({"model": model, **row})
                starts = " ".join(f"{ratio:.3f}" for ratio in row["ratio_of_each_start"])
                print(
                    f"{model:5} {row['case']:17} {row['tokens_per_second']:6.0f} tokens/s, "
                    f"{row['ratio']:.3f} [{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}] of "
                    f"{row['over']}; starts {starts}; by processor {row['processor_ratio']:.3f} "
                    f"[{row['processor_q1']:.3f}, {row['processor_q3']:.3f}], "
                    f"{row['processor_ms_per_step']:.2f} ms a step "
                    f"({row['more_ms_per_step']:+.3f})",
                    flush=True,
                )
    if args.out is not None:
        head = header("vLLM throughput, interleaved")
        head["versions"]["vllm"] = vllm.__version__
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        write_records(args.out, {**head, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
