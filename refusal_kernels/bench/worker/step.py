"""What a method is to do, and the step that is timed: a prompt, or the next token of every row."""

import inspect
import time
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from . import MOST
from .models import input_ids

SHORT = 4  # with so many steps in a measurement one goes before: what others left costs the first


@dataclass
class SteeringTask:
    """What a method is to do."""

    directions: Tensor  # unit vectors, float32 [programs, hidden]
    rows: list[int]  # the program of every row of the batch
    layers: list[int] | None  # the blocks to steer; None: all, and so the whole stream
    mode: str  # "eager", "compile" or "graph": what is done around the method afterwards
    variant: str | None  # what follows the colon in the name of the method
    folder: str  # of the model's configuration and weights
    work: str  # "decode" or "prefill"

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


class TimedStep:
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
            self.call = torch.compile(with_code_of_its_own(self.call), dynamic=False)
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


def with_code_of_its_own(call: Any) -> Any:
    """Return a function that does the same, with a code object of its own.

    Compiled graphs are kept by code object, and by default none is guarded by hooks: of the copies
    of a model, which share their code, one with hooks would run the graph of one without.
    """

    def step(**fed: Any) -> Any:
        return call(**fed)

    code = step.__code__.replace()
    return FunctionType(code, step.__globals__, step.__name__, None, step.__closure__)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
