"""The steering of one worker's model: the adds in it, and the route of every batch."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from refusal_kernels import __version__
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.ops import inductor
from refusal_kernels.ops.registry import backend_name
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.config import EngineSettings
from refusal_kernels.vllm.families import architecture_of, find_places, whole_model
from refusal_kernels.vllm.monitor import Histogram, Meter
from refusal_kernels.vllm.names import GRAPH, KEY, RESOLVED
from refusal_kernels.vllm.programs import NamedProgram, Sent, parse_program, received
from refusal_kernels.vllm.reading import Reading
from refusal_kernels.vllm.requests import Steering
from refusal_kernels.vllm.routing import Router
from refusal_kernels.vllm.sites import claim

logger = logging.getLogger("vllm.refusal_kernels")  # so that vLLM's handlers print it
MOST_VERSIONS = 1024  # of programs: 64 kB each at hidden size 8192


class WorkerState:
    """The steering of one model runner."""

    def __init__(self, runner: Any, settings: EngineSettings) -> None:
        config = runner.vllm_config
        scheduler, model = config.scheduler_config, config.model_config
        architecture = architecture_of(model)
        places = find_places(runner.model, architecture)
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        blocks = model.get_total_num_hidden_layers()
        self.bank = Bank(
            places,
            model.get_hidden_size(),
            rows=scheduler.max_num_seqs,
            slots=settings.slots,
            tokens=max(scheduler.max_num_batched_tokens, captured),
            device=str(runner.device),
            whole=whole_model(places, blocks),
        )
        for name, program in settings.programs.items():
            self._add(name, program)
        self.sites = claim(places, self.bank, settings.fuse_norms)
        inductor.register()  # tracing does it too, but a compile cache skips tracing
        self.router = Router(self.bank, config.speculative_config is not None)
        self.monitor = self._watch(settings)
        self.reading: Reading | None = None
        if settings.reads is not None:
            self.reading = Reading(
                settings.reads, self.bank, self.sites, blocks, get_tp_group().rank_in_group == 0
            )
        self._uncounted = 0  # tokens of a routed batch that the monitor has not counted
        # vLLM's compile cache is keyed by its configuration and its own code. All else that the
        # graph depends on is added to the configuration here.
        config.additional_config[KEY] = {
            **config.additional_config[KEY],
            GRAPH: [
                __version__,
                backend_name(self.bank.route.device.type, model.dtype),
                [place.name for place in places],
                list(self.bank.vectors.shape),
                self.bank.route.shape[0],
                [inductor.MOST, inductor.MOST_ROUTED],
                settings.fuse_norms,
                settings.monitor and settings.monitor.block_input,
                settings.reads,
            ],
        }
        logger.info(
            "refusal_kernels: %d places of %s, %d programs, %d rows of %d slots",
            *(len(places), architecture, len(settings.programs), *self.bank.vectors.shape[::2]),
        )

    def learn(self, req_id: str, params: Any) -> None:
        """Take note of a request: a new one, or one that comes again under its id.

        Parameters
        ----------
        req_id
            Its id.
        params
            Its sampling or pooling parameters.
        """
        self.router.learn(req_id, _resolved(params))
        if self.reading is not None:
            self.reading.mark(req_id, params)

    def route(
        self, req_ids: list[str], counts: np.ndarray, computed: np.ndarray, positions: Tensor
    ) -> None:
        """Route a batch, as `Router.route`."""
        self.router.route(req_ids, counts, computed, positions)
        if self.reading is not None:
            self.reading.follow(req_ids, counts, computed)
        if self.monitor is not None:
            self._uncounted = int(counts.sum())

    def forget(self, req_ids: Iterable[str]) -> None:
        """Forget requests that have ended."""
        for req_id in req_ids:
            self.router.forget(req_id)
            if self.reading is not None:
                self.reading.forget(req_id)

    def count(self) -> None:
        """Let monitor and reading keep what they saw. Dummy batches are not routed."""
        if self.monitor is not None and self._uncounted:
            self.monitor.count(self._uncounted)
        self._uncounted = 0
        if self.reading is not None:
            self.reading.after_forward()

    def read_monitor(self) -> dict[str, Any] | None:
        """Return the counts of the monitor; None on a rank without the watched block."""
        return None if self.monitor is None else self.monitor.read()

    def clear_monitor(self) -> None:
        """Forget what the monitor counted: V2 warms up with requests of its own."""
        if self.monitor is not None:
            self.monitor.clear()

    def update_programs(
        self,
        vectors: dict[str, Sent],
        programs: dict[str, Any],
        named: list[str],
    ) -> str | None:
        """Make programs available while the engine runs.

        Parameters
        ----------
        vectors
            Directions by name, as `sent` writes them.
        programs
            New programs in their JSON form, by name.
        named
            The versions that requests can name from now on. Others are kept while a request holds
            them; the last `MOST_VERSIONS` are kept for requests that are still queued.

        Returns
        -------
        str or None
            The reason for a refusal.
        """
        before = list(self.bank.versions)
        try:
            directions = {name: received(vector) for name, vector in vectors.items()}
            for name, given in programs.items():
                self._add(name, parse_program(name, given, directions))
            if missing := sorted(set(named) - set(self.bank.versions)):
                raise InputError(
                    f"a worker does not have program version {missing[0]}; are the direction files "
                    "the same on all nodes?"
                )
        except (InputError, torch.OutOfMemoryError) as error:
            self.bank.keep_only(set(before))
            return first_line(error)
        held = {s.version for s in self.router.steering.values() if s is not None}
        self.bank.keep_only({*named, *held, *self.bank.versions[-MOST_VERSIONS:]})
        return None

    def _add(self, name: str, program: NamedProgram) -> None:
        try:
            self.bank.add(program)
        except InputError as error:
            raise InputError(f"program {name!r}: {error}") from None

    def _watch(self, settings: EngineSettings) -> Histogram | None:
        """Put a meter at the watched place, if this rank has it."""
        monitor = settings.monitor
        if monitor is None:
            return None
        for place, site in zip(self.bank.places, self.sites, strict=True):
            if place.feeds == monitor.block_input:
                tokens, device = self.bank.route.shape[0], str(self.bank.route.device)
                site.meter = Meter(settings.directions[monitor.direction], tokens, device)
                return Histogram(site.meter)
        return None


def _resolved(params: Any) -> Steering | None:
    """Return what the front end wrote into a request's parameters."""
    extra = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}
    resolved = extra.get(RESOLVED)
    return None if resolved is None else Steering(*resolved)
