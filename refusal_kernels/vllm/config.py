"""The engine's settings, ``additional_config={"refusal_kernels": {...}}``: parsed and checked."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import finite_number
from refusal_kernels.vllm.limits import MAX_STRENGTH, Limits
from refusal_kernels.vllm.names import GRAPH, KEY, VERSIONS
from refusal_kernels.vllm.programs import NamedProgram, parse_directions, parse_programs
from refusal_kernels.vllm.refusals import refuse_reading, refuse_unsupported
from refusal_kernels.vllm.settings_file import with_file

KNOWN = (
    *("directions", "programs", "default", "slots", "fuse_norms", "monitor"),
    *("max_strength", "file", "reads"),
)
MOST_SLOTS = 16


@dataclass(frozen=True)
class Monitor:
    """A direction whose component is watched at the input of one block, in every request.

    Attributes
    ----------
    direction
        Its name.
    block_input
        The number of the block.
    """

    direction: str
    block_input: int


@dataclass(frozen=True)
class EngineSettings:
    """The plugin's part of an engine's configuration.

    Attributes
    ----------
    directions
        By name.
    programs
        By name.
    default
        The program of requests that name none; None leaves them unsteered.
    slots
        The most interventions of a program. The compiled graph depends on it, so it is fixed while
        the engine lives.
    fuse_norms
        Whether one kernel computes an add and the norm that follows it. The fused norm rounds once,
        vLLM's twice: in half precision an unsteered request may differ in the last bit from an
        engine without the plugin. False keeps vLLM's bits, at the cost of one more pass.
    monitor
        What is watched, or None.
    limits
        What limits the strength of programs; None where the model is not known.
    given, specifications
        The settings and the programs in their JSON form, the latter with those of a file.
    reads
        How many tokens at the end of a prompt the experiment may read (`reading`); with 0 it reads
        logits alone. None: nothing is read of any request.
    """

    directions: dict[str, Any]
    programs: dict[str, NamedProgram]
    default: str | None
    slots: int
    fuse_norms: bool
    monitor: Monitor | None
    limits: Limits | None
    given: dict[str, Any]
    specifications: dict[str, Any]
    reads: int | None

    @property
    def versions(self) -> dict[str, str]:
        """The version of each program, by name."""
        return {name: program.version for name, program in self.programs.items()}


def read_settings(vllm_config: Any) -> EngineSettings:
    """Return the settings of an engine that asks for steering.

    Raises
    ------
    InputError
        If they are not as described in docs/serving.md, the engine cannot be steered, or the
        programs are not those that another process of the engine has read.
    """
    refuse_unsupported(vllm_config)
    limits, given = Limits.of(vllm_config.model_config), vllm_config.additional_config[KEY]
    settings = parse_settings(given, limits)
    if given.get(VERSIONS, settings.versions) != settings.versions:
        raise InputError(
            "the files of the programs changed while the engine started, or differ between its "
            "machines; start it again"
        )
    if settings.monitor is not None and vllm_config.parallel_config.data_parallel_size > 1:
        raise InputError("monitor does not support data parallelism: vLLM asks one rank alone")
    if settings.reads is not None:
        refuse_reading(vllm_config)
    return settings


def parse_settings(given: Any, limits: Limits | None = None) -> EngineSettings:
    """Read the settings from their JSON form, for a model with these limits."""
    if not isinstance(given, dict):
        raise InputError(f"additional_config[{KEY!r}] is {given!r}; expected an object")
    alone, given = given, with_file(given)
    if unknown := sorted(set(given) - {*KNOWN, GRAPH, VERSIONS}):
        raise InputError(
            f"additional_config[{KEY!r}] has {unknown[0]!r}; expected {', '.join(KNOWN)}"
        )
    directions = parse_directions(given.get("directions", {}))
    if len(sizes := sorted({d.hidden for d in directions.values()})) > 1:
        raise InputError(f"directions of different hidden sizes: {sizes}; expected the model's")
    strength = finite_number(given.get("max_strength", MAX_STRENGTH), "max_strength")
    if strength <= 0:
        raise InputError(f"max_strength is {strength}; expected a number above 0")
    limits = limits and dataclasses.replace(limits, strength=strength)
    programs = parse_programs(given.get("programs", {}), directions, limits)
    default = given.get("default")
    if default is not None and default not in programs:
        there = ", ".join(programs) or "none"
        raise InputError(f"default is {default!r}; expected null or a program, of which: {there}")
    largest = max((p.slots for p in programs.values()), default=1)
    slots = given.get("slots", largest)
    if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= MOST_SLOTS:
        raise InputError(f"slots is {slots!r}; expected a number from 1 to {MOST_SLOTS}")
    if largest > slots:
        raise InputError(f"slots is {slots}, but a program takes {largest}")
    fuse_norms = given.get("fuse_norms", True)
    if not isinstance(fuse_norms, bool):
        raise InputError(f"fuse_norms is {fuse_norms!r}; expected true or false")
    monitor, reads = _monitor(given, directions, limits), given.get("reads")
    if reads is not None and (type(reads) is not int or reads < 0):
        raise InputError(f"reads is {reads!r}; expected null or a number of tokens")
    return EngineSettings(
        *(directions, programs, default, slots, fuse_norms, monitor, limits, alone),
        given.get("programs", {}),
        reads,
    )


def _monitor(
    given: dict[str, Any], directions: dict[str, Any], limits: Limits | None
) -> Monitor | None:
    monitor = given.get("monitor")
    if monitor is None:
        return None
    if not isinstance(monitor, dict) or set(monitor) != {"direction", "block_input"}:
        raise InputError(
            f"monitor is {monitor!r}; expected null or an object with direction and block_input"
        )
    direction, block = monitor["direction"], monitor["block_input"]
    if direction not in directions:
        raise InputError(
            f"monitor: there is no direction {direction!r}; expected one of "
            f"{', '.join(directions) or 'none, as directions is empty'}"
        )
    if isinstance(block, bool) or not isinstance(block, int) or block < 0:
        raise InputError(f"monitor: block_input is {block!r}; expected the number of a block")
    if limits is not None and directions[direction].hidden != limits.hidden:
        raise InputError(
            f"monitor: direction {direction!r} has hidden size {directions[direction].hidden}; "
            f"the model has {limits.hidden}"
        )
    if limits is not None and block >= limits.blocks:
        raise InputError(f"monitor: block_input is {block}; the model has {limits.blocks} blocks")
    return Monitor(direction, block)
