"""The protocol: methods are opened, timed round by round, and closed."""

import contextlib
import gc
import importlib.util
import json
import os
import random
import sys
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import BASE, EVERY_SITE, MOST, SITES
from .models import around_the_same_weights, load
from .observe import MemoryMark, launches, left_of
from .step import SteeringTask, TimedStep

LEAST = {"decode": 2, "prefill": 1}


def read_method(path: str) -> ModuleType:
    """Import a method's file."""
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks up by name what a file's functions read
    spec.loader.exec_module(module)
    if not hasattr(module, "steer"):
        raise TypeError("there is no function steer(model, task)")
    sites = getattr(module, "SITES", SITES)
    if isinstance(sites, str) or not set(sites) <= EVERY_SITE:
        raise TypeError(f"SITES is {sites!r}; expected a tuple of {', '.join(sorted(EVERY_SITE))}")
    return module


def reason(error: BaseException) -> str:
    """Return why there is no time, in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and text:
        return f"cannot: {text}"
    return f"failed: {type(error).__name__}: {text}"


def shuffled(names: Iterable[str], number: int) -> list[str]:
    """Return the order of a round.

    It is random. If every other round were reversed, the first method would follow itself, with all
    that it needs in the caches, and so would the last.
    """
    order = list(names)
    random.Random(number).shuffle(order)
    return order


class MethodServer:
    """Opens methods on copies of one model and times them."""

    def __init__(self) -> None:
        self.loaded: tuple[Any, ...] = ()
        self.model: Any = None
        self.steps: dict[str, TimedStep] = {}
        self.errors: dict[str, str] = {}
        self.stack = ExitStack()

    def open(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make every method's copy, check it, and prepare what is timed."""
        self.close()
        cell, folder, device = order["cell"], order["folder"], order["device"]
        if order["threads"]:
            torch.set_num_threads(order["threads"])
        wanted = (folder, cell["dtype"], device)
        if self.loaded != wanted:
            self.model, self.loaded = None, ()
            gc.collect()
            self.model, self.loaded = load(*wanted), wanted
        if cell["mode"] == "compile":  # which takes seconds to import
            torch._dynamo.reset()
            config: Any = torch._dynamo.config
            self.stack.enter_context(config.patch(recompile_limit=64))
        opened: dict[str, Any] = {}
        with torch.inference_mode():  # what a process does once is no method's memory
            TimedStep(self.model, self.model, cell, nullcontext).once()
        for name, (path, variant) in order["methods"].items():
            try:
                opened[name] = self._method(name, path, variant, order)
            except Exception as error:
                if os.environ.get("REFUSAL_KERNELS_BENCH_TRACE"):
                    sys.excepthook(*sys.exc_info())
                opened[name] = {"status": reason(error)}
        if BASE in self.steps:
            with torch.inference_mode():
                seconds = self.steps[BASE].timed()
            least = LEAST[cell["work"]] if seconds < order["measure_s"] else 1
            for step in self.steps.values():
                step.repeats = max(least, min(MOST, round(order["measure_s"] / max(seconds, 1e-9))))
        return {"methods": opened, "versions": versions()}

    def _method(
        self, name: str, path: str, variant: str | None, order: dict[str, Any]
    ) -> dict[str, Any]:
        from safetensors.torch import load_file, save_file

        cell, device = order["cell"], order["device"]
        task = SteeringTask(
            load_file(order["directions"], device=device)["directions"],
            order["rows"], order["layers"], cell["mode"], variant, order["folder"], cell["work"],
        )  # fmt: skip
        module = read_method(path)
        during = (lambda: module.during(task)) if hasattr(module, "during") else nullcontext
        memory = MemoryMark(device)
        model = around_the_same_weights(self.model)
        stack = ExitStack()
        try:
            with during():
                call = stack.enter_context(module.steer(model, task))
            with torch.inference_mode():
                step = TimedStep(call, model, cell, during)
                logits = step.once().double().cpu()  # before it is compiled
                step.rewind()
                grown = memory.grown()
                watched = call if hasattr(call, "get_decoder") else model
                left = None if name == BASE else left_of(watched, step, task)
                step.prepare()
                count = launches(step, device)
                logits = step.once().double().cpu()
                step.rewind()
            save_file({"logits": logits}, order["logits"].format(name.replace("/", "-")))
        except BaseException:
            stack.close()
            raise
        self.stack.push(stack)
        self.steps[name] = step
        return {
            "status": "ok",
            "about": (module.__doc__ or "").split("\n")[0],
            "sites": list(getattr(module, "SITES", SITES)),
            "residual": left,
            "memory_mib": grown,
            "launches": count,
        }

    def round(self, number: int) -> dict[str, Any]:
        """Time every method once, in an order that is another in every round."""
        seconds: dict[str, float] = {}
        with torch.inference_mode():
            for name in shuffled(self.steps, number):
                try:
                    if not seconds:  # what others left is no cost of the first
                        self.steps[name].once()
                        self.steps[name].rewind()
                    seconds[name] = self.steps[name].timed()
                except Exception as error:
                    self.errors[name] = reason(error)
                    del self.steps[name]
        return {"seconds": seconds, "errors": self.errors}

    def close(self) -> dict[str, Any]:
        """Undo every method."""
        self.steps, self.errors = {}, {}
        self.stack.close()
        gc.collect()
        return {}


def versions() -> dict[str, str]:
    """Return the versions of the packages that the methods of this environment use."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {}
    names = os.environ.get("REFUSAL_KERNELS_BENCH_NAMES", "").split()
    for name in ("torch", "transformers", *names):
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def main(server: Any) -> None:
    """Serve until the input ends; what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            order = json.loads(line)
            if order["do"] == "open":
                answer = server.open(order)
            else:
                answer = server.round(order["number"]) if order["do"] == "round" else server.close()
        except Exception as error:
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    server.close()
