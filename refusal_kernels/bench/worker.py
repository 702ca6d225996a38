"""Check and time methods on one model, told line by line; run by path, in any environment.

A peer has its own environment, without this package: so this file needs torch, transformers and
safetensors alone, and nothing beside it. Every worker times its own unmodified model with its
methods, so that a ratio never compares two versions of anything.

It reads one JSON object a line from its standard input and answers each with one:

    {"do": "open", "cell": {...}, "methods": {name: [file, variant]}, ...}   -> what each method is
    {"do": "round", "number": 0}                                             -> seconds a step
    {"do": "close"}

A method is a file with a docstring, whose first line says what it does, and

    @contextmanager
    def steer(model, task):       # the task: see `Task`
        ...                       # change this copy of the model
        yield model               # what is called like the model, and gives its logits
        ...                       # undo, where it reaches further than the copy

It may also give ``SITES``, where in a block it edits ("input", "attn", "mlp", "output"; without it
the first three), and ``during(task)``, a context in which it is run. What it cannot do it says by
``raise NotImplementedError("why")``.
"""

import contextlib
import copy
import gc
import importlib.util
import inspect
import json
import os
import random
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

BASE = "unmodified"
SITES = ("input", "attn", "mlp")
FAR = 1e9  # JSON has no infinity
MOST = 16  # steps in one measurement, and room for them in the cache
LEAST = {"decode": 2, "prefill": 1}
SHORT = 4  # with so many steps in a measurement one goes before: what others left costs the first


@dataclass
class Task:
    """What a method is to do.

    Attributes
    ----------
    directions
        Unit vectors, float32 [programs, hidden].
    rows
        The program of every row of the batch.
    layers
        The blocks to steer, by number; None: all, and so the whole stream.
    mode
        "eager", "compile" or "graph": what is done around the method afterwards.
    variant
        What follows the colon in the name of a method.
    folder
        Holds the model's configuration and weights.
    work
        "decode" or "prefill".
    """

    directions: Tensor
    rows: list[int]
    layers: list[int] | None
    mode: str
    variant: str | None
    folder: str
    work: str

    def per_row(self, dtype: torch.dtype) -> Tensor:
        """The direction of each row, [1 or batch, 1, hidden], in the dtype of the stream."""
        one = len(self.directions) == 1
        rows = self.directions if one else self.directions[self.rows]
        return rows[:, None].to(dtype)

    def blocks(self, count: int) -> list[int]:
        """The numbers of the blocks to steer, of so many."""
        return list(range(count)) if self.layers is None else self.layers

    def refuse(self, what: str, layers: bool = False, programs: bool = True) -> None:
        """Say that some layers alone, or a program for each row, cannot be had."""
        if programs and len(self.directions) > 1:
            raise NotImplementedError(f"{what} has one direction for all rows of a batch")
        if layers and self.layers is not None:
            raise NotImplementedError(f"{what} acts on all layers")


# --- models --------------------------------------------------------------------------------------


@contextmanager
def _no_weights() -> Any:
    """Make modules with their buffers, but no memory for their parameters."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None:
            data = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(data, requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load(folder: str, dtype: str, device: str) -> Any:
    """Load a causal model; on a CPU the weights stay in the file, which all workers share."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with _no_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    weights = load_file(str(Path(folder) / "model.safetensors"), device=device)
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights are not in the file, {missing[0]} first")
    return model.to(device).eval().requires_grad_(False)


def around_the_same_weights(model: Any) -> Any:
    """Copy a model's modules, not its weights."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def blocks_of(model: Any) -> Any:
    """Return the decoder layers of a model of the usual make."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    return decoder.layers


def stream_norms(model: Any) -> list[tuple[int | None, nn.Module]]:
    """Return the modules that read the stream: two norms in each block, and the final one.

    With each the number of the block that wrote last before it; None before the first.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    found: list[tuple[int | None, nn.Module]] = []
    for number, block in enumerate(decoder.layers):
        block = getattr(block, "block", block)  # wrapped, by some
        found += [(number - 1 if number else None, block.input_layernorm)]
        found += [(number, block.post_attention_layernorm)]
    return [*found, (len(decoder.layers) - 1, decoder.norm)]


# --- the work ------------------------------------------------------------------------------------


class Work:
    """What one method does in a cell: a prompt, or the next token of every row."""

    def __init__(self, call: Any, model: Any, cell: dict[str, Any], during: Any) -> None:
        self.call, self.cell, self.during, self.repeats = call, cell, during, 1
        self.cache: Any = None
        self.config, self.device = model.config, model.device
        ids = input_ids(cell, model.config.vocab_size).to(model.device)
        # given 1, a model slices, and PyTorch then copies the head's weights for every row, in
        # bfloat16 on a CPU: 20 GB for eight rows of the largest shape
        last = torch.tensor([-1], device=model.device)
        self.fed: dict[str, Any] = {"input_ids": ids, "logits_to_keep": last, "use_cache": False}
        if cell["work"] == "decode":
            self._fill(model, ids)

    def _fill(self, model: Any, ids: Tensor) -> None:
        from transformers import DynamicCache
        from transformers import StaticCache as FixedCache

        if self.cell["mode"] == "eager":
            self.cache = DynamicCache(config=self.config)
        else:
            self.cache = FixedCache(self.config, self.cell["tokens"] + MOST)
            if not hasattr(self.cache.layers[0], "cumulative_length"):
                raise NotImplementedError("this transformers has no fixed cache to be rewound")
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.model
        # versions of transformers call it differently
        named = "cache" in inspect.signature(decoder.forward).parameters
        self.fed |= {"use_cache": True, "cache" if named else "past_key_values": self.cache}
        self.fed["input_ids"] = ids[:, :-1].contiguous()
        self.once()
        self.fed["input_ids"] = ids[:, -1:].contiguous()

    def once(self) -> Tensor:
        """Return the logits of the last position of every row, [batch, vocabulary]."""
        with self.during():
            return self._step()

    def _step(self) -> Tensor:
        out = self.call(**self.fed)
        logits = out if isinstance(out, Tensor) else out.logits
        return logits[:, -1]

    def timed(self) -> float:
        """Return the seconds of a step."""
        if self.repeats >= SHORT:
            self.once()
            self.rewind()
        with self.during():
            synchronize()
            start = time.perf_counter()
            for _ in range(self.repeats):
                self._step()
            synchronize()
            seconds = time.perf_counter() - start
        self.rewind()
        return seconds / self.repeats

    def rewind(self) -> None:
        """Take out of the cache what the last run put there."""
        if self.cache is None:
            return
        extra = int(self.cache.get_seq_length()) - self.cell["tokens"]
        if self.cell["mode"] != "eager":
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.cell["tokens"])
        elif extra > 0:
            self.cache.crop(-extra)

    def prepare(self) -> None:
        """Compile or capture, as the mode wants it, and run once."""
        if self.cell["mode"] == "compile":
            self.call = torch.compile(with_own_code(self.call), dynamic=False)
        elif self.cell["mode"] == "graph":
            self._capture()
        self.once()
        self.rewind()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.once()
                self.rewind()
        torch.cuda.current_stream().wait_stream(stream)
        graph, eager = torch.cuda.CUDAGraph(), self.call
        with self.during(), torch.cuda.graph(graph):
            out = eager(**self.fed)

        def replay(**fed: Any) -> Any:
            graph.replay()
            return out

        self.call = replay
        self.rewind()


def with_own_code(call: Any) -> Any:
    """Return a function that does the same, with a code object of its own.

    Compiled graphs are kept by code object, and by default none is guarded by hooks: of the copies
    of a model, which share their code, one with hooks would run the graph of one without.
    """

    def step(**fed: Any) -> Any:
        return call(**fed)

    code = step.__code__.replace()
    return FunctionType(code, step.__globals__, step.__name__, None, step.__closure__)


def input_ids(cell: dict[str, Any], vocabulary: int) -> Tensor:
    """The tokens of a cell; of a decode the last is the one that is fed."""
    length = cell["tokens"] + (cell["work"] == "decode")
    return (torch.arange(cell["batch"] * length) * 7919 % vocabulary).view(cell["batch"], length)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- what is found beside the time ---------------------------------------------------------------


def left_of(model: Any, work: Work, task: Task) -> float | None:
    """Return the largest ``|r . h| / |h|`` at what the norms read, where it should be gone.

    Seen by the norms themselves, whatever the method: they come after every edit. Not by hooks,
    since there are methods that remove all of them. None where no norm was called.
    """
    worst: list[float] = []
    directions = task.directions.double()
    one = len(directions) == 1

    def seeing(norm: nn.Module) -> Any:
        forward = norm.forward

        def see(*args: Any, **kwargs: Any) -> Any:
            h = (args[0] if args else kwargs["hidden_states"]).double()
            h = h.reshape(len(task.rows), -1, h.shape[-1])
            rows = (directions if one else directions[task.rows])[:, :, None]
            along = (h @ rows).abs().squeeze(-1)
            share = float((along / h.norm(dim=-1).clamp_min(1e-30)).max())  # padding may be 0
            worst.append(share if share < FAR else FAR)  # also where it is no number
            return forward(*args, **kwargs)

        return see

    norms = stream_norms(model)
    steered = set(task.blocks(len(norms) // 2))
    seen = [norm for k, (by, norm) in enumerate(norms) if by in steered or k // 2 in steered]
    for norm in seen:
        norm.__dict__["forward"] = seeing(norm)
    try:
        work.once()
    finally:
        for norm in seen:
            del norm.__dict__["forward"]
        work.rewind()
    return max(worst, default=None)


class _Ops(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def launches(work: Work, device: str) -> int | None:
    """Count the kernels of one step on a GPU; on a CPU the ops, views apart, where not compiled."""
    try:
        if device.startswith("cuda"):
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                work.once()
                synchronize()
            kinds = ("Memcpy", "Memset")
            return sum(
                event.device_type == torch.autograd.DeviceType.CUDA
                and not event.name.startswith(kinds)
                for event in found.events()
            )
        if work.cell["mode"] != "eager":
            return None
        with _Ops() as ops:
            work.once()
        return ops.count
    finally:
        work.rewind()


class Memory:
    """The high-water mark of memory, from the moment it is made, in MiB."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
            self.before = self._status("VmRSS")

    @staticmethod
    def _status(name: str) -> float:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(x.split()[1]) / 1024 for x in lines if x.startswith(name))
        except (OSError, StopIteration):
            return float("nan")

    def grown(self) -> float | None:
        """How far above what was in use it went; None where nothing tells it."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self._status("VmHWM")
        return None if peak != peak else max(0.0, round(peak - self.before, 2))


# --- the protocol --------------------------------------------------------------------------------


def read_method(path: str) -> ModuleType:
    """Import a method's file."""
    spec = importlib.util.spec_from_file_location(f"method_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # torch.compile looks up by name what a file's functions read
    spec.loader.exec_module(module)
    return module


def reason(error: BaseException) -> str:
    """Return why there is no time, in one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, NotImplementedError) and text:
        return f"cannot: {text}"
    return f"failed: {type(error).__name__}: {text}"


def shuffled(names: Iterable[str], number: int) -> list[str]:
    """Return the order of a round.

    By chance: were every other one reversed, the first would follow itself, with all that it needs
    in the caches, and so would the last (0.3 % of a compiled step of the toy model).
    """
    order = list(names)
    random.Random(number).shuffle(order)
    return order


@dataclass
class Session:
    """One cell, open."""

    works: dict[str, Work]
    stack: ExitStack
    errors: dict[str, str] = field(default_factory=dict)

    def round(self, number: int) -> dict[str, Any]:
        """Time every method once, in an order that is another in every round."""
        seconds: dict[str, float] = {}
        names = shuffled(self.works, number)
        with torch.inference_mode():
            for name in names:
                try:
                    if not seconds:  # what others left is no cost of the first
                        self.works[name].once()
                        self.works[name].rewind()
                    seconds[name] = self.works[name].timed()
                except Exception as error:
                    self.errors[name] = reason(error)
                    del self.works[name]
        return {"seconds": seconds, "errors": self.errors}


class Worker:
    """Answers the lines."""

    def __init__(self) -> None:
        self.loaded: tuple[Any, ...] = ()
        self.model: Any = None
        self.session: Session | None = None

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
        session = self.session = Session({}, ExitStack())
        if cell["mode"] == "compile":  # which takes seconds to import
            torch._dynamo.reset()
            config: Any = torch._dynamo.config
            session.stack.enter_context(config.patch(recompile_limit=64))
        found: dict[str, Any] = {}
        with torch.inference_mode():  # what a process does once is no method's memory
            Work(self.model, self.model, cell, nullcontext).once()
        for name, (path, variant) in order["methods"].items():
            try:
                found[name] = self._method(name, path, variant, order)
            except Exception as error:
                if os.environ.get("REFUSAL_KERNELS_BENCH_TRACE"):
                    sys.excepthook(*sys.exc_info())
                found[name] = {"status": reason(error)}
        if BASE in session.works:
            with torch.inference_mode():
                seconds = session.works[BASE].timed()
            least = LEAST[cell["work"]] if seconds < order["measure_s"] else 1
            for work in session.works.values():
                work.repeats = max(least, min(MOST, round(order["measure_s"] / max(seconds, 1e-9))))
        return {"methods": found, "versions": _versions()}

    def _method(
        self, name: str, path: str, variant: str | None, order: dict[str, Any]
    ) -> dict[str, Any]:
        from safetensors.torch import load_file, save_file

        assert self.session is not None
        cell, device = order["cell"], order["device"]
        task = Task(
            load_file(order["directions"], device=device)["directions"],
            order["rows"], order["layers"], cell["mode"], variant, order["folder"], cell["work"],
        )  # fmt: skip
        module = read_method(path)
        during = (lambda: module.during(task)) if hasattr(module, "during") else nullcontext
        memory = Memory(device)
        model = around_the_same_weights(self.model)
        stack = ExitStack()
        try:
            with during():
                call = stack.enter_context(module.steer(model, task))
            with torch.inference_mode():
                work = Work(call, model, cell, during)
                logits = work.once().double().cpu()  # before it is compiled
                work.rewind()
                grown = memory.grown()
                watched = call if hasattr(call, "get_decoder") else model
                left = None if name == BASE else left_of(watched, work, task)
                work.prepare()
                count = launches(work, device)
                logits = work.once().double().cpu()
                work.rewind()
            save_file({"logits": logits}, order["logits"].format(name.replace("/", "-")))
        except BaseException:
            stack.close()
            raise
        self.session.stack.push(stack)
        self.session.works[name] = work
        return {
            "status": "ok",
            "about": (module.__doc__ or "").split("\n")[0],
            "sites": list(getattr(module, "SITES", SITES)),
            "residual": left,
            "memory_mib": grown,
            "launches": count,
        }

    def close(self) -> dict[str, Any]:
        """Undo every method."""
        if self.session is not None:
            self.session.stack.close()
            self.session = None
            gc.collect()
        return {}

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Do what a line says."""
        if order["do"] == "open":
            return self.open(order)
        if order["do"] == "round":
            assert self.session is not None
            return self.session.round(order["number"])
        return self.close()


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "torch",
        "transformers",
        *os.environ.get("REFUSAL_KERNELS_BENCH_NAMES", "").split(),
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def main(worker: Any) -> None:
    """Serve until the input ends; what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            answer = {"error": reason(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()


if __name__ == "__main__":
    main(Worker())
