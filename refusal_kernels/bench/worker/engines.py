"""The worker of vLLM: whole engines that take turns. The protocol is that of `serve`.

An engine without the plugin is the unmodified model; beside it one with the plugin, every request
ablated, and one without whose layers have plain Python hooks. What is timed is the generation of
`STEPS` tokens after a prompt of `PROMPT`, so its tokens/s are not those of the other methods.
"""

import contextlib
import gc
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # a process for each engine
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # the hooks travel to the engine's process
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from . import BASE, SITES
from .models import input_ids
from .serve import reason, shuffled, versions

PLUGIN, HOOKS = "vllm:plugin", "vllm:hooks"
ABOUT = {
    BASE: "vLLM without the plugin.",
    PLUGIN: "vLLM with this package's plugin, every request ablated.",
    HOOKS: "vLLM without the plugin, three plain Python hooks per layer, eager.",
}
STEPS, PROMPT = 32, 16


def put_hooks(r: list[float], model: Any) -> int:
    """Hook every layer of an engine's model, in the engine's own process.

    The stream comes to a layer in two parts, to be added.
    """
    unit = torch.tensor(r).to(next(model.parameters()))

    def project(x: Any) -> Any:
        if isinstance(x, tuple):
            return (project(x[0]), *x[1:])
        return x if x is None else x - (x @ unit)[..., None] * unit

    def on_input(module: Any, args: Any) -> Any:
        positions, hidden, residual = args
        return positions, project(hidden), project(residual)

    for layer in model.model.layers:
        layer.register_forward_pre_hook(on_input)
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(lambda module, args, out: project(out))
    return len(model.model.layers)


class EngineServer:
    """Starts engines and times them."""

    def __init__(self) -> None:
        self.engines: dict[str, tuple[Any, dict[str, str] | None]] = {}
        self.batch = 0

    def _engine(self, order: dict[str, Any], config: dict[str, Any], eager: bool) -> Any:
        from vllm import LLM

        cell = order["cell"]
        return LLM(
            model=order["folder"],
            skip_tokenizer_init=True,
            dtype=cell["dtype"],
            enforce_eager=eager,
            max_model_len=max(cell["tokens"] + 2, PROMPT + STEPS),
            max_num_seqs=cell["batch"],
            gpu_memory_utilization=0.2,
            kv_cache_memory_bytes=256 << 20,
            enable_prefix_caching=False,
            max_logprobs=-1,
            additional_config=config,
        )

    def _start(self, name: str, order: dict[str, Any]) -> tuple[Any, dict[str, str] | None]:
        import vllm.plugins
        from safetensors.torch import load_file

        eager = order["cell"]["mode"] == "eager"
        r = load_file(order["directions"])["directions"][0]
        if name == PLUGIN:
            from refusal_kernels import Direction

            file = str(Path(order["directions"]).with_name("vllm-direction.safetensors"))
            Direction(r).save(file)
            steering = {"directions": {"r": file}, "programs": {"r": {"ablate": "r"}}}
            os.environ.pop("VLLM_PLUGINS", None)
            vllm.plugins.plugins_loaded = False
            return self._engine(order, {"refusal_kernels": steering}, eager), {"steer": "r"}
        if name == HOOKS and not eager:
            raise NotImplementedError("Python hooks do nothing in a compiled engine")
        os.environ["VLLM_PLUGINS"] = ""
        engine = self._engine(order, {}, eager)
        if name == HOOKS:
            engine.apply_model(partial(put_hooks, r.tolist()))
        return engine, None

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Start an engine for every method, and ask each for the next token's distribution."""
        from safetensors.torch import save_file

        self.close()
        cell = order["cell"]
        opened: dict[str, Any] = {}
        self.batch = cell["batch"]
        for name in order["methods"]:
            try:
                if cell["work"] != "decode":
                    raise NotImplementedError("engines are timed decoding")
                if order["layers"] is not None or cell["programs"] > 1:
                    raise NotImplementedError("engines are timed with one program on all layers")
                self.engines[name] = engine, extra = self._start(name, order)
                vocabulary = json.loads((Path(order["folder"]) / "config.json").read_text())
                ids = input_ids(cell, vocabulary["vocab_size"]).tolist()
                out = self._generate(engine, extra, ids, max_tokens=1, logprobs=-1)
                rows = [one.outputs[0].logprobs[0] for one in out]
                logits = torch.tensor([[r[k].logprob for k in range(len(r))] for r in rows])
                file = order["logits"].format(name.replace("/", "-"))
                save_file({"logprobs": logits.double()}, file)
                opened[name] = {"status": "ok", "about": ABOUT[name]}
                opened[name]["sites"] = [] if name == BASE else list(SITES)
            except Exception as error:
                self.engines.pop(name, None)
                opened[name] = {"status": reason(error)}
        return {"methods": opened, "versions": versions()}

    def _generate(self, engine: Any, extra: Any, ids: list[list[int]], **wanted: Any) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, extra_args=extra, **wanted
        )
        prompts = [{"prompt_token_ids": row} for row in ids]
        return engine.generate(prompts, params, use_tqdm=False)

    def round(self, number: int) -> dict[str, Any]:
        """Time every engine once."""
        seconds = {}
        ids = [[3 + (k + 31 * row) % 190 for k in range(PROMPT)] for row in range(self.batch)]
        for name in shuffled(self.engines, number):
            start = time.perf_counter()
            self._generate(*self.engines[name], ids, max_tokens=STEPS)
            seconds[name] = (time.perf_counter() - start) / STEPS
        return {"seconds": seconds, "errors": {}}

    def close(self) -> dict[str, Any]:
        """End the engines."""
        for engine, _ in self.engines.values():
            with contextlib.suppress(Exception):
                engine.llm_engine.engine_core.shutdown()
        self.engines.clear()
        gc.collect()
        return {}
