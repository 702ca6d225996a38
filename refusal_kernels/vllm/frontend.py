"""The front end: programs by name, and the program of each request before it is queued."""

import asyncio
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.vllm.config import EngineSettings, parse_settings
from refusal_kernels.vllm.counters import REQUESTS, counted_change, counter
from refusal_kernels.vllm.names import (
    CATALOG,
    GROUPS,
    KEY,
    MOMENTS,
    MONITOR,
    READ,
    READINGS,
    RESOLVED,
    UPDATE,
)
from refusal_kernels.vllm.programs import NONE, NamedProgram, Sent, check_name, parse_program, sent
from refusal_kernels.vllm.requests import Steering, cache_salt, read_steering
from refusal_kernels.vllm.settings_file import FILE

MOST_PROGRAMS = 1024  # of an engine: each takes milliseconds to read and memory on the device
# settings that cannot change while an engine runs, by attribute
FIXED = {
    "fuse_norms": "fuse_norms",
    "monitor": "monitor",
    "limits": "max_strength",
    "reads": "reads",
}


# programs and directions that a caller adds once its engine has started: refused before it loads
following: ContextVar[tuple[Mapping[str, Any], Mapping[str, Direction]] | None] = ContextVar(
    "refusal_kernels_programs", default=None
)


@dataclass(frozen=True)
class Change:
    """A change of the programs that has been checked and not been made.

    Attributes
    ----------
    directions, programs, default
        All of them, and the default, after the change.
    vectors, specifications
        For the workers: the new programs in their JSON form, by name, and their directions by name,
        each its vector and layer.
    """

    directions: dict[str, Direction]
    programs: dict[str, NamedProgram]
    default: str | None
    vectors: dict[str, Sent]
    specifications: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the workers' method `UPDATE`."""
        named = sorted({program.version for program in self.programs.values()})
        return self.vectors, self.specifications, named


class Catalog:
    """The programs that requests can name.

    Attributes
    ----------
    directions, programs
        By name.
    default
        The program of requests that name none, or None.
    settings
        Those with which the engine was started.
    changing
        Held by a change from its check until it is made.
    """

    def __init__(self, settings: EngineSettings, servers: int) -> None:
        self.programs = dict(settings.programs)
        self.directions = dict(settings.directions)
        self.default = settings.default
        self.settings = settings
        self.changing = asyncio.Lock()
        self._servers = servers

    def read(self, extra_args: Mapping[str, Any] | None, prompt: int = 0) -> Steering | None:
        """Return the steering that a request asks for, as `read_steering`."""
        if READ in (extra_args or {}):
            if self.settings.reads is None:
                raise InputError(f"{READ!r} is for an engine whose settings have 'reads'")
            _check_mark((extra_args or {})[READ])
        return read_steering(extra_args, self.programs, self.default, prompt)

    def name_of(self, steering: Steering | None) -> str:
        """Return the name of a request's program; of one that is gone, its version."""
        if steering is None:
            return NONE
        names = (name for name, p in self.programs.items() if p.version == steering.version)
        return next(names, steering.version)

    def resolve(self, request: Any) -> None:
        """Write a request's steering into an ``EngineCoreRequest``, and salt its prefixes.

        Raises
        ------
        InputError
            If its arguments are malformed or name no program.
        """
        sampling, pooling = request.sampling_params, request.pooling_params
        extra = sampling.extra_args if sampling is not None else pooling.extra_kwargs
        steering = self.read(extra, _prompt_length(request))
        windowed = steering is not None and (steering.first, steering.end) != (0, None)
        if windowed and request.resumable:
            raise InputError("a request whose prompt comes in parts is steered at all positions")
        counter(REQUESTS).labels(self.name_of(steering)).inc()
        if steering is None:
            return
        resolved = {**(extra or {}), RESOLVED: list(steering)}
        if sampling is not None:
            sampling.extra_args = resolved
        else:
            pooling.extra_kwargs = resolved
        request.cache_salt = cache_salt(request.cache_salt, steering)

    # --- changes while the engine runs

    def plan(self, programs: Mapping[str, Any], directions: Mapping[str, Direction]) -> Change:
        """Check a change: programs in their JSON form by name, None to remove one.

        Raises
        ------
        InputError
            If it is malformed or removes the default program.
        """
        self._check_servers()
        self._check_count(programs)
        for name in directions:
            check_name(name, "direction")
        known = {**self.directions, **directions}
        after = dict(self.programs)
        for name, given in programs.items():
            if given is not None:
                after[name] = parse_program(name, given, known, self.settings.limits)
                self._check_slots(name, after[name].slots)
            elif after.pop(name, None) is None:
                raise InputError(f"there is no program {name!r} to remove")
            elif name == self.default:
                raise InputError(f"program {name!r} is the default; it cannot be removed")
        new = {name: given for name, given in programs.items() if given is not None}
        # a direction goes with the last program that names it; those of the start stay
        gone = _used(self.programs.values()) - _used(after.values())
        gone -= {*self.settings.directions, *directions}
        known = {name: direction for name, direction in known.items() if name not in gone}
        vectors = _vectors(known, [after[name] for name in new])
        return Change(known, after, self.default, vectors, new)

    def plan_reload(self) -> Change:
        """Check the change to what an engine would have that starts with the file as it is.

        Raises
        ------
        InputError
            If there is no file, it is malformed, or it changes what is fixed while an engine runs.
        """
        self._check_servers()
        started = self.settings
        if FILE not in started.given:
            raise InputError(
                f"this engine was started without a {FILE!r} of settings; it has none to reload"
            )
        new = parse_settings(started.given, started.limits)
        for name, program in new.programs.items():
            self._check_slots(name, program.slots)
        for name, setting in FIXED.items():
            if getattr(new, name) != getattr(started, name):
                raise InputError(f"{setting} cannot change while the engine runs; start it again")
        if (watched := started.monitor) is not None and not torch.equal(
            new.directions[watched.direction].vector, started.directions[watched.direction].vector
        ):
            raise InputError(
                f"direction {watched.direction!r} is watched; it cannot change while the engine "
                "runs"
            )
        vectors = _vectors(new.directions, new.programs.values())
        return Change(new.directions, new.programs, new.default, vectors, new.specifications)

    def commit(self, change: Change, answers: list[str | None]) -> None:
        """Make a change that all workers have made.

        Raises
        ------
        InputError
            With the reason of a worker that refused; nothing has changed then.
        """
        if refused := [answer for answer in answers if answer is not None]:
            raise InputError(refused[0])
        self.directions, self.programs = change.directions, change.programs
        self.default = change.default

    def _check_slots(self, name: str, slots: int) -> None:
        if slots > self.settings.slots:
            raise InputError(
                f"program {name!r} takes {slots} slots; the engine was started with slots "
                f"{self.settings.slots}"
            )

    def _check_count(self, programs: Mapping[str, Any]) -> None:
        if len({*self.programs, *programs}) > MOST_PROGRAMS:
            raise InputError(f"more than {MOST_PROGRAMS} programs; remove some first")

    def _check_servers(self) -> None:
        if self._servers > 1:
            raise InputError(
                f"programs cannot change: {self._servers} API servers each have their own list; "
                "start the engine with one"
            )


def _check_mark(mark: Any) -> None:
    """Refuse what no worker could read: it would end the engine."""
    good = isinstance(mark, list | tuple) and len(mark) == 3 and mark[0] in READINGS
    good = good and all(type(number) is int and 0 <= number < 2**63 for number in mark[1:])
    if not good or mark[2] >= 2**31 or (mark[0] == MOMENTS and mark[1] >= GROUPS):
        raise InputError(
            f"{READ!r} is {mark!r}; expected [{' or '.join(READINGS)}, number, length of prompt]"
        )


def _used(programs: Iterable[NamedProgram]) -> set[str]:
    return {name for program in programs for name in program.directions}


def _vectors(
    directions: Mapping[str, Direction], programs: Iterable[NamedProgram]
) -> dict[str, Sent]:
    """Return the directions of programs as the workers take them."""
    return {name: sent(directions[name]) for name in sorted(_used(programs))}


def _prompt_length(request: Any) -> int:
    """Return how many tokens the prompt of an ``EngineCoreRequest`` has, images included."""
    ids = request.prompt_token_ids
    return len(request.prompt_embeds if ids is None else ids)


def catalog_of(engine: Any) -> Catalog:
    """Return the catalog of an ``LLM``, an ``LLMEngine`` or an ``AsyncLLM``.

    Raises
    ------
    InputError
        If the engine was started without steering.
    """
    processor = getattr(engine, "llm_engine", engine).input_processor
    catalog: Catalog | None = getattr(processor, CATALOG, None)
    if catalog is None:
        raise InputError(f"this engine was started without additional_config[{KEY!r}]")
    return catalog


def set_programs(
    llm: Any, programs: Mapping[str, Any], directions: Mapping[str, Direction] | None = None
) -> None:
    """Add, change and remove programs of a running engine, without compiling again.

    Running requests keep the program with which they began.

    Parameters
    ----------
    llm
        A ``vllm.LLM``.
    programs
        In their JSON form by name; None removes one.
    directions
        Further directions, by name.

    Raises
    ------
    InputError
        If the change is refused; nothing has changed then.
    """
    catalog = catalog_of(llm)
    with counted_change():
        change = catalog.plan(programs, directions or {})
        catalog.commit(change, llm.collective_rpc(UPDATE, args=change.arguments))


async def set_programs_async(
    engine: Any, programs: Mapping[str, Any], directions: Mapping[str, Direction] | None = None
) -> None:
    """Do the same to a ``vllm.AsyncLLM``."""
    catalog = catalog_of(engine)
    async with catalog.changing:
        with counted_change():
            change = await asyncio.to_thread(catalog.plan, programs, directions or {})
            catalog.commit(change, await engine.collective_rpc(UPDATE, args=change.arguments))


async def reload_programs_async(engine: Any) -> None:
    """Read the settings file of a ``vllm.AsyncLLM`` again: what it has is then what it serves.

    Programs that were changed by other means are as the file says, or gone. Running requests keep
    the program with which they began.

    Raises
    ------
    InputError
        If the file is refused; nothing has changed then.
    """
    catalog = catalog_of(engine)
    async with catalog.changing:
        with counted_change():
            change = await asyncio.to_thread(catalog.plan_reload)
            catalog.commit(change, await engine.collective_rpc(UPDATE, args=change.arguments))


def read_monitor(llm: Any) -> dict[str, Any]:
    """Return the counts of the monitor of a ``vllm.LLM`` since it started.

    Returns
    -------
    dict
        ``edges`` (upper edges of the buckets, of shares from -1 to 1), ``counts`` (tokens in each)
        and ``sum`` of the shares.

    Raises
    ------
    InputError
        If the engine was started without a monitor.
    """
    return first_answer(catalog_of(llm), llm.collective_rpc(MONITOR))


def first_answer(catalog: Catalog, answers: list[Any]) -> dict[str, Any]:
    """Return the counts of the first rank that has the watched block; all that have it agree."""
    counts: dict[str, Any] | None = next((a for a in answers if a is not None), None)
    if catalog.settings.monitor is None or counts is None:
        raise InputError("this engine was started without a monitor; give one in its settings")
    return counts
