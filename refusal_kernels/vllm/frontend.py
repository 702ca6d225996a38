"""The front end's side: programs by name, and what every request asks for, before it is queued."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.vllm.config import KEY, EngineSettings, read_settings
from refusal_kernels.vllm.programs import NamedProgram, check_name, parse_program
from refusal_kernels.vllm.requests import RESOLVED, Steering, cache_salt, read_steering

UPDATE, MONITOR = "refusal_kernels_update", "refusal_kernels_monitor"


@dataclass(frozen=True)
class Change:
    """A change of the programs that was found good, and is not made yet.

    Attributes
    ----------
    directions, programs
        All of them, as they will be.
    vectors, specifications
        What the workers need for the programs that are new: directions by name, programs in their
        JSON form by name.
    """

    directions: dict[str, Direction]
    programs: dict[str, NamedProgram]
    vectors: dict[str, list[float]]
    specifications: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the workers' method is called with."""
        named = sorted({program.version for program in self.programs.values()})
        return self.vectors, self.specifications, named


class Catalog:
    """The programs that requests can name."""

    def __init__(self, settings: EngineSettings, servers: int) -> None:
        self.programs = dict(settings.programs)
        self.directions = dict(settings.directions)
        self.default = settings.default
        self.slots = settings.slots
        self.monitor = settings.monitor
        self._servers = servers

    @classmethod
    def of(cls, vllm_config: Any) -> "Catalog | None":
        """Return the catalog of an engine that asks for steering."""
        settings = read_settings(vllm_config)
        if settings is None:
            return None
        return cls(settings, vllm_config.parallel_config._api_process_count)

    def read(self, extra_args: Mapping[str, Any] | None) -> Steering | None:
        """Return what a request asks for, as `read_steering`."""
        return read_steering(extra_args, self.programs, self.default)

    def resolve(self, request: Any) -> None:
        """Write into an ``EngineCoreRequest`` what is done to it, and salt its prefixes.

        Raises
        ------
        InputError
            If it asks for what is not there.
        """
        sampling, pooling = request.sampling_params, request.pooling_params
        extra = sampling.extra_args if sampling is not None else pooling.extra_kwargs
        steering = self.read(extra)
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
        """Check a change: programs in their JSON form by name, None for one that goes.

        Raises
        ------
        InputError
            If it is malformed, or a program that goes is the default.
        """
        if self._servers > 1:
            raise InputError(
                f"programs can not change: {self._servers} API servers each have their own list"
            )
        for name in directions:
            check_name(name, "direction")
        known = {**self.directions, **directions}
        after = dict(self.programs)
        for name, given in programs.items():
            if given is not None:
                after[name] = parse_program(name, given, known)
            elif after.pop(name, None) is None:
                raise InputError(f"there is no program {name!r} to remove")
            elif name == self.default:
                raise InputError(f"program {name!r} is the default; it can not be removed")
        new = {name: given for name, given in programs.items() if given is not None}
        vectors = {name: d.vector.tolist() for name, d in known.items()} if new else {}
        return Change(known, after, vectors, new)

    def commit(self, change: Change, answers: list[str | None]) -> None:
        """Make a change, after all workers have taken it.

        Raises
        ------
        InputError
            With the reason of a worker that could not; nothing has changed then.
        """
        if refused := [answer for answer in answers if answer is not None]:
            raise InputError(refused[0])
        self.directions, self.programs = change.directions, change.programs


def catalog_of(engine: Any) -> Catalog:
    """Return the catalog of an ``LLM``, an ``LLMEngine`` or an ``AsyncLLM``.

    Raises
    ------
    InputError
        If the engine was started without steering.
    """
    processor = getattr(engine, "llm_engine", engine).input_processor
    catalog: Catalog | None = getattr(processor, "refusal_kernels", None)
    if catalog is None:
        raise InputError(f"this engine was started without additional_config[{KEY!r}]")
    return catalog


def set_programs(
    llm: Any, programs: Mapping[str, Any], directions: Mapping[str, Direction] | None = None
) -> None:
    """Add, change and remove programs of a running engine; nothing is compiled anew.

    Running requests keep the program that they began with.

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
        If it can not be done; nothing has changed then.
    """
    catalog = catalog_of(llm)
    change = catalog.plan(programs, directions or {})
    catalog.commit(change, llm.collective_rpc(UPDATE, args=change.arguments))


async def set_programs_async(
    engine: Any, programs: Mapping[str, Any], directions: Mapping[str, Direction] | None = None
) -> None:
    """Do the same to a ``vllm.AsyncLLM``."""
    catalog = catalog_of(engine)
    change = catalog.plan(programs, directions or {})
    catalog.commit(change, await engine.collective_rpc(UPDATE, args=change.arguments))


def read_monitor(llm: Any) -> dict[str, Any]:
    """Return what the monitor of a ``vllm.LLM`` counted since it started.

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
    """Return what the first rank that holds the watched block counted; the others hold the same."""
    found: dict[str, Any] | None = next((a for a in answers if a is not None), None)
    if catalog.monitor is None or found is None:
        raise InputError("this engine was started without a monitor, or has no such block")
    return found
