"""How things are timed: everything in every round, so that a change of load hits all alike.

On a CPU a reading is a few calls by the wall clock. On a GPU it is one replay of a CUDA graph
between two events: **cold**, the calls go round a ring of buffers larger than the L2 cache, as the
layers of a model do; **hot**, they all take the same buffers.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from cases import Case, Operands
from providers import Call, Missing, Provider

from refusal_kernels.timing import in_turns, synchronize

Reading = Callable[[], float]
"""Seconds per call; on a GPU known only after the device was waited for."""
Timed = Callable[[], Reading]

WARM_UP_CALLS = 3  # the first compiles, the second may still allocate
READING_BYTES = 4 << 20  # a CPU reading moves at least this much: about 0.2 ms, far above the clock
GRAPH_BYTES = 1 << 30  # and a graph this much (a third of a millisecond), in at most ...
GRAPH_CALLS = 20  # ... this many calls, or one turn of the ring
HOST_BYTES = 4 << 20  # above this a queue of unfinished kernels could slow the host down


@dataclass(frozen=True)
class Subject:
    """A provider, ready to be timed.

    Attributes
    ----------
    calls, sets
        Calls in one reading, and the buffer sets that they go round.
    host_seconds
        What one call costs the host, without waiting for the device; None where not measured.
    """

    timed: Timed
    calls: int
    sets: int = 1
    host_seconds: float | None = None


def interleaved(subjects: Mapping[str, Timed], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Read every subject in every round, every other round in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number, order in in_turns(subjects, rounds, warmup):
        readings = {name: subjects[name]() for name in order}
        synchronize()
        if number >= 0:
            for name, reading in readings.items():
                seconds[name].append(reading())
    return seconds


def rounds_for(subjects: Mapping[str, Timed], limit_s: float, least: int, most: int) -> int:
    """Choose as many rounds as fit into a time, between two bounds."""
    start = time.perf_counter()
    interleaved(subjects, rounds=1, warmup=1)
    return max(least, min(most, int(2 * limit_s / (time.perf_counter() - start))))


def ratio(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return first quartile, median and third quartile of the ratios round by round."""
    per_round = [a / b for a, b in zip(seconds, base, strict=True)]
    low, middle, high = statistics.quantiles(per_round, n=4, method="inclusive")
    return low, middle, high


def warm(call: Call, slow_s: float) -> None:
    """Call until everything is compiled and allocated.

    Raises
    ------
    Missing
        If the last of the calls takes longer than ``slow_s``: it would hold up all the others.
    """
    for _ in range(WARM_UP_CALLS):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds = time.perf_counter() - start
    if seconds > slow_s:
        raise Missing(f"too slow to be timed: one call takes {1e3 * seconds:.0f} ms")


# --- CPU -----------------------------------------------------------------------------------------


def calls_per_reading(case: Case) -> int:
    return max(1, READING_BYTES // case.floor_bytes)


def repeated(call: Call, calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def on_host(call: Call, calls: int) -> Timed:
    """Time calls by the wall clock."""
    run = repeated(call, calls)

    def timed() -> Reading:
        start = time.perf_counter()
        run()
        seconds = (time.perf_counter() - start) / calls
        return lambda: seconds

    return timed


def prepare_cpu(provider: Provider, sets: Sequence[Operands], slow_s: float) -> dict[str, Subject]:
    """Make a provider ready: the mode is ``call``."""
    call, calls = provider(sets[0]), calls_per_reading(sets[0].case)
    warm(call, slow_s)
    return {"call": Subject(on_host(call, calls), calls)}


# --- GPU -----------------------------------------------------------------------------------------


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def ring_size(case: Case) -> int:
    """How many sets it takes for what the op reads to exceed twice the L2 cache; 2 at least."""
    return max(2, math.floor(2 * l2_bytes() / case.read_bytes) + 1)


def captured(calls: Sequence[Call], turns: int) -> Timed:
    """Capture all calls, ``turns`` times over, and time a replay with events.

    The outputs of one turn are alive together, so that each call of it writes to memory of its own.
    """
    graph = torch.cuda.CUDAGraph()
    # the outer context gives the stream back where a capture fails half-way
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for _ in range(turns):
            outputs = [call() for call in calls]
            del outputs

    def timed() -> Reading:  # by naming calls it keeps alive the buffers that the graph reads
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        return lambda: 1e-3 * start.elapsed_time(end) / (turns * len(calls))

    return timed


def after_itself(timed: Timed) -> Timed:
    """Run once, untimed, before the reading: the buffers are in the cache then."""

    def again() -> Reading:
        timed()
        return timed()

    return again


def host_seconds(call: Call, calls: int = 100, batches: int = 5) -> float:
    """Return what one call costs the host: many calls, nothing waited for."""
    seconds = []
    for _ in range(batches):
        synchronize()
        start = time.perf_counter()
        repeated(call, calls)()
        seconds.append((time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(seconds)


def prepare_cuda(provider: Provider, sets: Sequence[Operands], slow_s: float) -> dict[str, Subject]:
    """Make a provider ready: the modes are ``cold`` and, where one set fits the cache, ``hot``."""
    case, ring = sets[0].case, [provider(operands) for operands in sets]
    # on a side stream, as PyTorch asks for before a capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm(ring[0], slow_s)
    torch.cuda.current_stream().wait_stream(stream)

    host = host_seconds(ring[0]) if case.floor_bytes <= HOST_BYTES else None
    calls = max(1, min(GRAPH_CALLS, GRAPH_BYTES // case.floor_bytes))
    turns = math.ceil(calls / len(ring))
    subjects = {"cold": Subject(captured(ring, turns), turns * len(ring), len(ring), host)}
    if case.floor_bytes <= l2_bytes():
        hot = after_itself(captured(ring[:1], GRAPH_CALLS))
        subjects["hot"] = Subject(hot, GRAPH_CALLS, 1, host)
    return subjects


PREPARE = {"cpu": prepare_cpu, "cuda": prepare_cuda}
