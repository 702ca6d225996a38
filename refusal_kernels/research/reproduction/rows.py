"""Rows of numbers to be reproduced: the paper's, the toy model's, or one's own; and the comparison.

``paper.json`` beside this file holds the tables of Arditi et al. 2024 (arXiv 2406.11717), by model,
``toy_row.json`` what ``refusal-kernels reproduce --model toy --record FILE`` wrote.
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
from refusal_kernels.research.evaluation.outcomes import Rate

PAPER, TOY_ROW = (Path(__file__).with_name(name) for name in ("paper.json", "toy_row.json"))
FORMAT = "refusal_kernels.row"
RATES = "substring_*|harmless_*|skill_*"
# Of a recorded row: between instruction sets float32 sums differ by about 1e-4 in a score, and now
# and then a greedy answer takes the other of two words: two of a hundred prompts.
RECORDED = (
    ("bypass_score|induce_score", 0.02),
    ("kl_score", 0.002),
    (RATES, 0.02),
    ("mmlu_*|arc_*|gsm8k_*|truthfulqa_*", 1.0),
    ("*", 0.003),
)

Found = Rate | float
"""A number that was measured; a rate knows how many prompts are behind it."""


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from the one of a row.

    Attributes
    ----------
    within : float or None
        So much at most.
    prompts : int or None
        Or, of a rate: the row's is one of so many prompts, and may differ by chance alone.
    """

    within: float | None = None
    prompts: int | None = None


@dataclass(frozen=True)
class Row:
    """Numbers of one model from one source.

    Attributes
    ----------
    source, model : str
        Where they stand, and what the model is called there.
    numbers : dict of str to float
        By quantity, as "bypass_score".
    tolerances : dict of str to Tolerance
        By quantity; one without a tolerance is not compared.
    """

    source: str
    model: str
    numbers: dict[str, float]
    tolerances: dict[str, Tolerance]

    def save(self, path: Path) -> None:
        """Write it as JSON, for `read_row`."""
        tolerances = {
            quantity: {key: value for key, value in asdict(own).items() if value is not None}
            for quantity, own in self.tolerances.items()
        }
        write_json(path, {"format": FORMAT, **vars(self), "tolerances": tolerances})


@dataclass(frozen=True)
class Comparison:
    """One number beside one of a row.

    Attributes
    ----------
    quantity : str
        What was measured.
    found : Rate, float or None
        What it is here; None where it was not measured.
    expected : float or None
        What it is there; None where no row has it.
    low, high : float or None
        Between which it had to be.
    source : str
        Of the row; empty where there is none.
    verdict : str
        "within", "outside" or "no number".
    """

    quantity: str
    found: Found | None
    expected: float | None
    low: float | None
    high: float | None
    source: str
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        found = self.found.to_dict() if isinstance(self.found, Rate) else {"value": self.found}
        return {**vars(self), "found": None if self.found is None else found}


def compare(found: Mapping[str, Found], rows: Sequence[Row]) -> list[Comparison]:
    """Set every number beside those of the rows, in the order of what was found."""
    names = dict.fromkeys([*found, *(name for row in rows for name in row.tolerances)])
    comparisons = []
    for name in names:
        own = found.get(name)
        beside = [row for row in rows if name in row.numbers and name in row.tolerances]
        for row in beside:
            expected, tolerance = row.numbers[name], row.tolerances[name]
            low, high = accepted(expected, tolerance, own)
            verdict = "no number"
            if own is not None:
                value = own.value if isinstance(own, Rate) else own
                verdict = "within" if low <= value <= high else "outside"
            comparisons.append(Comparison(name, own, expected, low, high, row.source, verdict))
        if not beside:
            comparisons.append(Comparison(name, own, None, None, None, "", "no number"))
    return comparisons


def accepted(expected: float, tolerance: Tolerance, found: Found | None) -> tuple[float, float]:
    """Between which a number must be.

    With ``within`` at most so far away. A rate of some prompts beside one of others is accepted
    where the 95 % interval of their difference holds zero, which is Newcombe's (1998, method 10):
    made of the Wilson intervals of both. Returned are then the smallest and the largest such rate.
    """
    if tolerance.within is not None:
        # what is written with few digits must not fall out by the last bit
        margin = tolerance.within + 1e-9
        return expected - margin, expected + margin
    assert tolerance.prompts is not None
    n = found.n if isinstance(found, Rate) else tolerance.prompts
    theirs = Rate(round(expected * tolerance.prompts), tolerance.prompts)
    fitting = [k / n for k in range(n + 1) if alike(Rate(k, n), theirs)]
    return min(fitting, default=math.nan), max(fitting, default=math.nan)


def alike(one: Rate, other: Rate) -> bool:
    """Whether Newcombe's 95 % interval of the difference of two rates holds zero."""
    high, low = (one, other) if one.value >= other.value else (other, one)
    reach = math.hypot(high.value - high.interval[0], low.interval[1] - low.value)
    return high.value - low.value <= reach


@functools.cache
def paper() -> dict[str, Any]:
    """The paper's tables, and the models' names on the hub and there."""
    document: dict[str, Any] = read_json(PAPER)
    return document


def paper_name(model: str) -> str | None:
    """The name under which the paper's models are kept: the hub id's last part, in small letters.

    Parameters
    ----------
    model
        A hub id, a folder that is named like one, or a name of the paper's tables ("Gemma 2B").
    """
    models = paper()["models"]
    wanted = model.rstrip("/").rpartition("/")[2].lower()
    called = {title.lower(): name for name, title in models.items()}
    return wanted if wanted in models else called.get(wanted)


def paper_rows(model: str) -> list[Row]:
    """Every row that the paper and its repository have of a model; empty for an unknown one."""
    name = paper_name(model)
    rows = []
    for table in paper()["tables"] if name else ():
        for row in table["rows"]:
            known = dict(zip(table["columns"], row, strict=True))
            if known["model"] not in (name, paper()["models"][name]):
                continue
            numbers = {key: value for key, value in known.items() if key != "model"}
            rows.append(Row(table["source"], known["model"], numbers, _tolerances(numbers)))
    return rows


def _tolerances(numbers: Mapping[str, Any]) -> dict[str, Tolerance]:
    return {
        key: Tolerance(entry.get("within"), entry.get("prompts"))
        for key in numbers
        for entry in paper()["tolerances"]
        if _named(key, entry["quantities"])
    }


def _named(quantity: str, patterns: str) -> bool:
    return any(fnmatch(quantity, pattern) for pattern in patterns.split("|"))


def is_rate(quantity: str) -> bool:
    """Whether a quantity is a share of prompts, from 0 to 1."""
    return _named(quantity, RATES)


def recorded(found: Mapping[str, Found], source: str, model: str) -> Row:
    """Make a row of what was found, to compare later runs with."""
    numbers = {name: own.value if isinstance(own, Rate) else own for name, own in found.items()}
    tolerances = {
        name: Tolerance(next(within for names, within in RECORDED if _named(name, names)))
        for name in numbers
    }
    return Row(source, model, numbers, tolerances)


def read_row(path: Path) -> Row:
    """Read a recorded row.

    Raises
    ------
    InputError
        If the file is missing, or holds something else.
    """
    document = read_json(path)
    wrong = InputError(f"{path} is no row; expected what 'reproduce --record' writes")
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise wrong
    numbers, tolerances = document.get("numbers"), document.get("tolerances")
    texts = [document.get("source"), document.get("model")]
    if not (isinstance(numbers, dict) and isinstance(tolerances, dict)):
        raise wrong
    withins = [own.get("within") if isinstance(own, dict) else None for own in tolerances.values()]
    if not all(isinstance(text, str) for text in texts) or not all(
        type(value) in (int, float) for value in (*numbers.values(), *withins)
    ):
        raise wrong
    kept = {name: Tolerance(float(own["within"])) for name, own in tolerances.items()}
    return Row(str(texts[0]), str(texts[1]), {k: float(v) for k, v in numbers.items()}, kept)
