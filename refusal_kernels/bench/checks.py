"""The error of every method's logits, beside that of the unmodified model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from refusal_kernels.bench.grid import BenchCell
from refusal_kernels.bench.reference import reference_logits
from refusal_kernels.bench.results import LOGITS_TIMES
from refusal_kernels.bench.worker import BASE, FAR, SITES
from refusal_kernels.bench.worker.models import input_ids

NOISE = 1e-7  # how far the stream is moved, to see how sensitive a model is to rounding


def compare(
    cell: BenchCell,
    model: Any,
    directions: Tensor,
    folder: Path,
    rows: dict[str, dict[str, Any]],
    opened: Mapping[str, Sequence[str]],
) -> None:
    """Compare the logits with those of float64; write the errors and their limits into the rows.

    Parameters
    ----------
    model
        The one that is timed, from which float64's logits are made.
    directions
        Unit vectors, [programs, hidden].
    folder
        Where the workers left their logits.
    rows
        By method.
    opened
        The methods that are ready, by environment.
    """
    ids = input_ids(cell.record(), model.config.get_text_config(decoder=True).vocab_size)
    truths: dict[tuple[tuple[str, ...], float], Tensor] = {}

    def truth(sites: Sequence[str], noise: float = 0.0) -> Tensor:
        key = tuple(sorted(sites)), noise
        if key not in truths:
            where = cell.rows, cell.steered_blocks, key[0], noise
            truths[key] = reference_logits(model, ids, directions, *where)
        return truths[key]

    def off(environment: str, method: str, sites: Sequence[str]) -> float:
        name = f"{environment.replace(' ', '-')}-{method.replace('/', '-')}.logits"
        saved, wanted = load_file(str(folder / name)), truth(sites)
        if "logprobs" in saved:  # what engines give
            return _difference(saved["logprobs"], wanted.log_softmax(-1))
        return _difference(saved["logits"], wanted)

    def sensitivity(sites: Sequence[str]) -> float:
        return _difference(truth(sites, NOISE), truth(sites))

    for environment, methods in opened.items():
        base = off(environment, BASE, ())
        for method in methods:
            row = rows[method]
            row["base_logits_error"] = base
            sites = () if method == BASE else SITES
            row["logits_error"] = off(environment, method, sites)
            error = row["logits_error"]
            if method != BASE and set(row["sites"]) != set(SITES):
                error = row["logits_error_at_sites"] = off(environment, method, row["sites"])
            row["logits_allowed"] = LOGITS_TIMES * base
            if error > row["logits_allowed"]:
                # without most of its length, the stream is more sensitive to the same rounding
                worse = sensitivity(row["sites"]) / sensitivity(())
                row["logits_allowed"] *= max(1.0, worse)


def _difference(logits: Tensor, truth: Tensor) -> float:
    """Return the largest difference over the largest logit; what cannot be compared is far off."""
    if logits.shape != truth.shape:
        return FAR
    largest = float((logits - truth).abs().max() / truth.abs().max())
    return largest if largest < FAR else FAR  # also where it is no number
