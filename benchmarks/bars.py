"""The bars: what the package promises, as predicates over what was measured.

A bar compares the times of two providers, round by round, over all cases that it names, and takes
the worst. It is met, missed, or not measured; a bar that is missed is reported, and nothing else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cases import TRAFFIC, Case
from providers import UNSTEERED
from rows import Results, Row
from timing import ratio

MB = 10**6


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes
    ----------
    against
        Providers; where several were timed, the fastest counts.
    at_least, at_most
        One of them is given: the least speed relative to the other (0.92: at 92 % of its speed; 4:
        four times as fast), or the most time relative to it (1.05: 5 % longer).
    provider
        Whose promise it is; None: of the backend that serves by itself.
    modes
        Those that count; the worst decides.
    """

    name: str
    device: str
    ops: tuple[str, ...]
    against: tuple[str, ...]
    where: Callable[[Case], bool]
    at_least: float | None = None
    at_most: float | None = None
    provider: str | None = None
    modes: tuple[str, ...] = ("call",)

    @property
    def target(self) -> str:
        """The bound, in words."""
        sign, bound = ("<=", self.at_most) if self.at_least is None else (">=", self.at_least)
        return f"{sign} {bound:g}"

    def values(self, results: Results) -> Iterator[tuple[float, str]]:
        """Yield the measured value of every case, and what it is of."""
        for case, mode in results.timed():
            if case.op not in self.ops or mode not in self.modes or not self.where(case):
                continue
            rows = results.of(case, mode)
            mine = next((row for row in rows.values() if self._is_mine(row)), None)
            others = [rows[name] for name in self.against if name in rows]
            if mine is None or not others:
                continue
            other = max(others, key=lambda row: row.bytes_per_s)
            pair = (mine, other) if self.at_least is None else (other, mine)
            _, middle, _ = ratio(pair[0].seconds, pair[1].seconds)
            yield middle, f"{case}, {mode}, against {other.provider}"

    def _is_mine(self, row: Row) -> bool:
        return row.serves if self.provider is None else row.provider == self.provider

    def check(self, results: Results) -> dict[str, Any]:
        """Return name, target, the worst value, where it was measured, and the verdict."""
        values = list(self.values(results))
        bar: dict[str, Any] = {"name": self.name, "target": self.target, "cases": len(values)}
        if not values:
            return bar | {"verdict": "not measured"}
        if self.at_least is None:
            assert self.at_most is not None
            value, worst = max(values)
            met = value <= self.at_most
        else:
            value, worst = min(values)
            met = value >= self.at_least
        return bar | {"value": value, "worst": worst, "verdict": "met" if met else "missed"}


def _cpu(name: str, op: str, against: str, tokens: int, dtype: str | None, **bound: float) -> Bar:
    def where(case: Case) -> bool:
        sized = (case.tokens, case.hidden) == (tokens, 4096)
        return sized and dtype in (None, case.dtype)

    return Bar(name, "cpu", (op,), (against,), where, **bound)


def _large_bf16(case: Case) -> bool:
    return (
        case.dtype == "bfloat16"
        and 2048 <= case.hidden <= 16384
        and case.floor_bytes >= 64 * MB
    )  # fmt: skip


def _decode(case: Case) -> bool:
    return case.dtype == "bfloat16" and case.tokens <= 64 and case.hidden == 4096


def _long_prompts(case: Case) -> bool:
    size = (case.sequences, case.tokens, case.hidden)
    return case.dtype == "bfloat16" and size == (32, 32 * 512, 4096)


NORM = "add_steer_rms_norm"
GRAPH = ("cold", "hot")
BARS = (
    *(
        Bar(
            f"{op}, bfloat16, hidden 2048 to 16384, >= 64 MB: speed of a copy of as many bytes",
            "cuda", (op,), ("copy",), _large_bf16, at_least=0.92, modes=("cold",),
        )
        for op in ("add_steer", NORM)
    ),
    Bar(
        f"{NORM}, bfloat16, 1 to 64 tokens x 4096: time of the fastest fused norm without steering",
        "cuda", (NORM,), tuple(UNSTEERED), _decode, at_most=1.05, modes=GRAPH,
    ),
    Bar(
        f"{NORM}, bfloat16, 1 to 64 tokens x 4096: time of torch.compile",
        "cuda", (NORM,), ("torch.compile",), _decode, at_most=1.0, modes=GRAPH,
    ),
    Bar(
        "moments_, bfloat16, 32 x 512 x 4096: speed of a copy of as many bytes",
        "cuda", ("moments_",), ("copy",), _long_prompts, at_least=0.85, modes=("cold",),
    ),
    *(
        Bar(
            f"{op}: time of Triton over that of CUDA",
            "cuda", (op,), ("cuda",), lambda case: True, at_most=1.10, provider="triton",
            modes=GRAPH,
        )
        for op in TRAFFIC
    ),
    _cpu(
        "add_steer, 4096 x 4096: time of torch.add", "add_steer", "torch.add", 4096, None,
        at_most=1.05,
    ),
    *(
        _cpu(
            f"{NORM}, 4096 x 4096, {dtype}: time of torch.add + rms_norm",
            NORM, "torch.add + rms_norm", 4096, dtype, at_most=bound,
        )
        for dtype, bound in (("float32", 0.50), ("bfloat16", 0.22))
    ),
    *(
        _cpu(
            f"{NORM}, {tokens} x 4096: speed over torch.compile", NORM, "torch.compile", tokens,
            None, at_least=bound,
        )
        for tokens, bound in ((4, 4.0), (512, 1.4), (4096, 1.1))
    ),
    _cpu(
        "moments_, 4096 x 4096: speed over double().sum", "moments_", "double().sum", 4096, None,
        at_least=4.0,
    ),
)  # fmt: skip


def check_bars(results: Results, device: str) -> list[dict[str, Any]]:
    """Return the verdict on every bar of a device."""
    return [bar.check(results) for bar in BARS if bar.device == device]


def bar_lines(checked: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the verdicts in words: two lines a bar, the second the case that decided."""
    for bar in checked:
        value = f"{bar['value']:.3f}" if "value" in bar else ""
        yield f"{bar['verdict']:<12} {value:>6} {bar['target']:>7}  {bar['name']}"
        if "worst" in bar:
            yield f"{'':<30}worst of {bar['cases']}: {bar['worst']}"
