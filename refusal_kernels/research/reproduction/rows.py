"""Rows of recorded numbers, and their comparison with measured ones.

``paper.json`` holds the tables of Arditi et al. 2024 (arXiv 2406.11717), by model;
``toy_row.json`` was written by ``refusal-kernels reproduce --model toy --record FILE``.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json, write_json
from refusal_kernels.research.evaluation.rates import Rate

PAPER = Path(__file__).with_name("paper.json")
FORMAT = "refusal_kernels.row"
RATES = "substring_*|harmless_*|skill_*"
# The tolerances of a recorded row. Between instruction sets float32 sums differ by about 1e-4 in a
# score, and a few greedy answers choose another word: two of a hundred prompts.
RECORDED = (
    ("bypass_score|induce_score", 0.02),
    ("kl_score", 0.002),
    (RATES, 0.02),
    ("mmlu_*|arc_*|gsm8k_*|truthfulqa_*", 1.0),
    ("*", 0.003),
)

Measured = Rate | float
"""A measured number; a rate knows how many prompts it was measured on."""


def own_row(model: str) -> Path:
    """Return the file of the row that was recorded of a model by name; not every model has one."""
    return Path(__file__).with_name(f"{model}_row.json")


@dataclass(frozen=True)
class Tolerance:
    """How far a measured number may be from the recorded one; one of the two is given."""

    within: float | None = None  # the largest difference
    prompts: int | None = None  # of a recorded rate, from which a measured one may differ by chance


@dataclass(frozen=True)
class RecordedRow:
    """The numbers of one model from one source, by quantity, such as "bypass_score"."""

    source: str
    model: str  # its name there
    numbers: dict[str, float]
    tolerances: dict[str, Tolerance]  # a quantity without one is not compared

    def save(self, path: Path) -> None:
        """Write it as JSON, for `read_row`."""
        tolerances = {
            quantity: {key: value for key, value in asdict(tolerance).items() if value is not None}
            for quantity, tolerance in self.tolerances.items()
        }
        write_json(path, {"format": FORMAT, **vars(self), "tolerances": tolerances})


@dataclass(frozen=True)
class Comparison:
    """One measured number beside a recorded one."""

    quantity: str
    measured: Measured | None  # None if it was not measured
    expected: float | None  # the recorded number; None if no row has one
    low: float | None  # the smallest accepted number
    high: float | None  # the largest
    source: str  # of the row; empty without one
    verdict: str  # "within", "outside" or "no number"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        number = self.measured
        measured = number.to_dict() if isinstance(number, Rate) else {"value": number}
        return {**vars(self), "measured": None if number is None else measured}


def compare(measured: Mapping[str, Measured], rows: Sequence[RecordedRow]) -> list[Comparison]:
    """Compare every number with those of the rows, in the order of measurement."""
    comparisons = []
    for name in dict.fromkeys([*measured, *(name for row in rows for name in row.tolerances)]):
        number = measured.get(name)
        recording = [row for row in rows if name in row.numbers and name in row.tolerances]
        for row in recording:
            expected, tolerance = row.numbers[name], row.tolerances[name]
            low, high = accepted(expected, tolerance, number)
            verdict = "no number"
            if number is not None:
                value = number.value if isinstance(number, Rate) else number
                verdict = "within" if low <= value <= high else "outside"
            comparisons.append(Comparison(name, number, expected, low, high, row.source, verdict))
        if not recording:
            comparisons.append(Comparison(name, number, None, None, None, "", "no number"))
    return comparisons


def accepted(
    expected: float, tolerance: Tolerance, measured: Measured | None
) -> tuple[float, float]:
    """Return the smallest and the largest accepted number.

    With ``prompts``, a rate is accepted if the 95 % interval of the difference of both rates
    contains zero (`alike`).
    """
    if tolerance.within is not None:
        # numbers of few digits must not miss the bound by a rounding error
        margin = tolerance.within + 1e-9
        return expected - margin, expected + margin
    assert tolerance.prompts is not None
    n = measured.n if isinstance(measured, Rate) else tolerance.prompts
    recorded_rate = Rate(round(expected * tolerance.prompts), tolerance.prompts)
    fitting = [k / n for k in range(n + 1) if alike(Rate(k, n), recorded_rate)]
    return min(fitting, default=math.nan), max(fitting, default=math.nan)


def alike(one: Rate, other: Rate) -> bool:
    """Whether the 95 % interval of the difference of two rates contains zero.

    The interval is that of Newcombe 1998, method 10, made of both Wilson intervals.
    """
    high, low = (one, other) if one.value >= other.value else (other, one)
    reach = math.hypot(high.value - high.interval[0], low.interval[1] - low.value)
    return high.value - low.value <= reach


@functools.cache
def paper_tables() -> dict[str, Any]:
    """Read the paper's tables, and the models' names on the hub and in the paper."""
    document: dict[str, Any] = read_json(PAPER)
    return document


def paper_name(model: str) -> str | None:
    """Return the key of a model in ``paper.json``; None for a model that is not there.

    The model is a hub id, a folder that is named like one, or a name of the paper's tables
    ("Gemma 2B").
    """
    models = paper_tables()["models"]
    wanted = model.rstrip("/").rpartition("/")[2].lower()
    keys = {title.lower(): key for key, title in models.items()}
    return wanted if wanted in models else keys.get(wanted)


def paper_rows(model: str) -> list[RecordedRow]:
    """Return the rows of a model in the paper and its repository; none for an unknown model."""
    name = paper_name(model)
    rows = []
    for table in paper_tables()["tables"] if name else ():
        for row in table["rows"]:
            numbers = dict(zip(table["columns"], row, strict=True))
            title = numbers.pop("model")
            if title in (name, paper_tables()["models"][name]):
                rows.append(RecordedRow(table["source"], title, numbers, _tolerances(numbers)))
    return rows


def _tolerances(numbers: Mapping[str, Any]) -> dict[str, Tolerance]:
    return {
        key: Tolerance(entry.get("within"), entry.get("prompts"))
        for key in numbers
        for entry in paper_tables()["tolerances"]
        if _named(key, entry["quantities"])
    }


def _named(quantity: str, patterns: str) -> bool:
    return any(fnmatch(quantity, pattern) for pattern in patterns.split("|"))


def is_rate(quantity: str) -> bool:
    """Whether a quantity is a share of prompts, from 0 to 1."""
    return _named(quantity, RATES)


def recorded(measured: Mapping[str, Measured], source: str, model: str) -> RecordedRow:
    """Make a row of measured numbers, to compare later runs with."""
    numbers = {name: m.value if isinstance(m, Rate) else m for name, m in measured.items()}
    tolerances = {
        name: Tolerance(next(within for names, within in RECORDED if _named(name, names)))
        for name in numbers
    }
    return RecordedRow(source, model, numbers, tolerances)


def read_row(path: Path) -> RecordedRow:
    """Read a recorded row; the older names of quantities become today's."""
    document = read_json(path)
    wrong = InputError(f"{path} is no row; expected what 'reproduce --record' writes")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise wrong
    numbers, tolerances = document.get("numbers"), document.get("tolerances")
    texts = [document.get("source"), document.get("model")]
    if not (isinstance(numbers, dict) and isinstance(tolerances, dict)):
        raise wrong
    withins: dict[str, Any] = {
        name: entry.get("within") if isinstance(entry, dict) else None
        for name, entry in tolerances.items()
    }
    if not all(isinstance(text, str) for text in texts) or not all(
        type(value) in (int, float) for value in (*numbers.values(), *withins.values())
    ):
        raise wrong
    return RecordedRow(
        str(texts[0]),
        str(texts[1]),
        {current_name(name): float(value) for name, value in numbers.items()},
        {current_name(name): Tolerance(float(within)) for name, within in withins.items()},
    )


def current_name(quantity: str) -> str:
    """Return today's name of a quantity or an edit that an older file names."""
    return quantity.replace("baseline", "unmodified").replace("orthogonalised", "orthogonalized")
