"""The worker's side: a loaded model is claimed, and the tokens of every batch are routed."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from refusal_kernels import __version__
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.ops import inductor
from refusal_kernels.vllm.bank import Bank
from refusal_kernels.vllm.config import GRAPH, KEY, EngineSettings, read_settings
from refusal_kernels.vllm.families import find_places, whole_model
from refusal_kernels.vllm.monitor import Histogram, Meter
from refusal_kernels.vllm.programs import parse_program
from refusal_kernels.vllm.requests import RESOLVED, Steering
from refusal_kernels.vllm.sites import SteeredAdd, claim

logger = logging.getLogger("vllm.refusal_kernels")  # so that vLLM's handlers print it
STATE = "refusal_kernels_state"
MOST_VERSIONS = 1024  # of programs: 64 kB each at hidden size 8192


class WorkerState:
    """What one model runner knows of steering."""

    def __init__(self, runner: Any, settings: EngineSettings) -> None:
        config = runner.vllm_config
        scheduler = config.scheduler_config
        architecture = config.model_config.architecture
        names = config.model_config.hf_config.architectures or [architecture]
        places = find_places(runner.model, names[0])
        hidden = config.model_config.get_hidden_size()
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        self.bank = Bank(
            places,
            hidden,
            rows=scheduler.max_num_seqs,
            slots=settings.slots,
            tokens=max(scheduler.max_num_batched_tokens, captured),
            device=str(runner.device),
            whole=whole_model(places, config.model_config.get_total_num_hidden_layers()),
        )
        for program in settings.programs.values():
            self.bank.add(program)
        self.sites: list[SteeredAdd] = claim(places, self.bank, settings.fuse_norms)
        inductor.register()  # tracing does it too, but a cache may spare that
        self.steering: dict[str, Steering | None] = {}  # of the running requests, by id
        self.monitor = self._watch(config, settings)
        self._batch: tuple[list[str], bytes] | None = None  # the last: its requests, their tokens
        self._size = 0  # its tokens, all in all
        self._tokens = 0  # the same as long as it is under way
        # The key of vLLM's compile cache covers its own configuration and code, not what stands in
        # the model; all that the graph depends on must be there.
        config.additional_config[KEY] = {
            **config.additional_config[KEY],
            GRAPH: [
                __version__,
                [place.name for place in places],
                list(self.bank.vectors.shape),
                self.bank.route.shape[0],
                [inductor.MOST, inductor.MOST_ROUTED],
            ],
        }
        logger.info(
            "refusal_kernels: %d places of %s, %d programs, %d rows of %d slots",
            *(len(places), names[0], len(settings.programs), *self.bank.vectors.shape[::2]),
        )

    def route(
        self, req_ids: Sequence[str], requests: Mapping[str, Any], counts: np.ndarray
    ) -> None:
        """Route a batch.

        Parameters
        ----------
        req_ids
            The requests, in their order in the batch.
        requests
            What the runner knows of each: its sampling or pooling parameters.
        counts
            How many tokens of each are in the batch.
        """
        batch = list(req_ids), counts.tobytes()
        if batch != self._batch or not self.bank.routed:
            known = self.steering
            for req_id in req_ids:
                if req_id not in known:
                    request = requests[req_id]
                    known[req_id] = resolved(request.sampling_params or request.pooling_params)
            self.bank.route_batch([known[req_id] for req_id in req_ids], counts)
            self._batch = batch
            self._size = int(counts.sum())
        self._tokens = self._size

    def count(self) -> None:
        """Count what the monitor saw in the batch that was routed; of dummy batches nothing."""
        if self.monitor is not None and self._tokens:
            self.monitor.count(self._tokens)
        self._tokens = 0

    def _watch(self, config: Any, settings: EngineSettings) -> Histogram | None:
        """Put a meter at the place that is watched, if it is on this rank."""
        if settings.monitor is None:
            return None
        layers = config.model_config.get_total_num_hidden_layers()
        if settings.monitor.layer >= layers:
            raise InputError(
                f"monitor: layer is {settings.monitor.layer}; the model has {layers} blocks"
            )
        direction = settings.directions[settings.monitor.direction]
        for place, site in zip(self.bank.places, self.sites, strict=True):
            if place.feeds == settings.monitor.layer:
                tokens, device = self.bank.route.shape[0], str(self.bank.route.device)
                site.meter = Meter(direction, tokens, device)
                return Histogram(site.meter)
        return None

    def forget(self, req_ids: Any) -> None:
        """Forget requests that have ended."""
        for req_id in req_ids:
            self.steering.pop(req_id, None)
            self._batch = None  # the name may come again, for another request


def resolved(params: Any) -> Steering | None:
    """Return what the front end made of a request."""
    extra = getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}
    pair = extra.get(RESOLVED)
    return None if pair is None else Steering(str(pair[0]), float(pair[1]))


def attach(runner: Any) -> None:
    """Claim the model that a runner has loaded, if its engine asks for it."""
    settings = read_settings(runner.vllm_config)
    if settings is not None:
        setattr(runner, STATE, WorkerState(runner, settings))


def check_attached(worker: Any) -> None:
    """Run the start-up check of a worker whose engine asks for steering.

    Raises
    ------
    InputError
        If the check fails, or if this kind of model runner was never claimed.
    """
    from refusal_kernels.vllm.check import check

    runner = worker.model_runner
    state = state_of(runner)
    if state is not None:
        check(runner, state)
    elif read_settings(worker.vllm_config) is not None:
        kind = f"{type(runner).__module__}.{type(runner).__qualname__}"
        raise InputError(f"the model of {kind} is not steered: that runner is not known here")


def state_of(runner: Any) -> WorkerState | None:
    """Return what a runner knows of steering; None where nothing is steered."""
    state: WorkerState | None = getattr(runner, STATE, None)
    return state


def update_programs(
    worker: Any, vectors: dict[str, list[float]], programs: dict[str, Any], named: list[str]
) -> str | None:
    """Make programs available while the engine runs; a method that every worker is given.

    Parameters
    ----------
    vectors
        Directions, by name.
    programs
        New programs in their JSON form, by name.
    named
        The versions that requests can name from now on. Others are kept as long as a request holds
        them, and for the sake of those on their way, the last `MOST_VERSIONS`.

    Returns
    -------
    str or None
        Why it can not be done.
    """
    state = state_of(worker.model_runner)
    if state is None:
        return f"this engine was started without additional_config[{KEY!r}]"
    try:
        directions = {name: Direction(torch.tensor(v)) for name, v in vectors.items()}
        for name, given in programs.items():
            state.bank.add(parse_program(name, given, directions))
    except InputError as error:
        return str(error)
    held = {s.version for s in state.steering.values() if s is not None}
    versions = state.bank.versions
    state.bank.keep_only({*named, *held, *versions[-MOST_VERSIONS:]})
    return None


def read_monitor(worker: Any) -> dict[str, Any] | None:
    """Return what the monitor of a worker counted; a method that every worker is given."""
    state = state_of(worker.model_runner)
    return None if state is None or state.monitor is None else state.monitor.read()
