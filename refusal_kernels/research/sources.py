"""Where prompts come from: files and public datasets; how they are split and filtered.

No prompt of a public set is stored in this package. A preset only says where a set is published.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refusal_kernels.errors import InputError, first_line
from refusal_kernels.research.prompt_files import (
    SUFFIXES,
    check_prompt,
    find_field,
    find_input,
    read_file,
)

# Arditi et al. 2024, appendix A: prompts per class
SIZES: Mapping[str, int] = {"train": 128, "validation": 32, "test": 100}
SEED = 42


@dataclass(frozen=True)
class Dataset:
    """Where a set of prompts is published, and which of its rows are meant."""

    name: str  # what ``datasets.load_dataset`` takes: a hub id, or a local folder
    config: str | None = None
    split: str = "train"
    column: str | None = None  # with the prompts; None for the first of `prompt_files.FIELDS`
    where: Mapping[str, str] | None = None  # only the rows whose columns have these values


PRESETS: Mapping[str, Dataset] = {
    "advbench": Dataset("walledai/AdvBench", column="prompt"),
    "malicious_instruct": Dataset("walledai/MaliciousInstruct", column="prompt"),
    "tdc2023": Dataset("walledai/TDC23-RedTeaming", column="prompt"),
    "harmbench": Dataset("walledai/HarmBench", "standard", column="prompt"),
    "jailbreakbench": Dataset("JailbreakBench/JBB-Behaviors", "behaviors", "harmful", "Goal"),
    "jailbreakbench_benign": Dataset("JailbreakBench/JBB-Behaviors", "behaviors", "benign", "Goal"),
    "strongreject": Dataset("walledai/StrongREJECT", column="prompt"),
    # as in the paper: instructions that need no further input
    "alpaca": Dataset("tatsu-lab/alpaca", column="instruction", where={"input": ""}),
    # over-refusal: what looks harmful and is not
    "xstest": Dataset("Paul/XSTest", column="prompt", where={"label": "safe"}),
}
_SPEC = re.compile(
    r"hf:(?P<name>[^:@#]+)(?::(?P<config>[^:@#]+))?(?:@(?P<split>[^@#]+))?(?:#(?P<column>[^#]+))?"
)


def read_prompts(source: str | os.PathLike[str], column: str | None = None) -> list[str]:
    """Read prompts from a file, or from a dataset by its name.

    Parameters
    ----------
    source
        One of, or several joined by "+":

        - a UTF-8 file. ``.txt``: one prompt per line, blank lines are skipped. ``.jsonl``: per line
          a string, a list of messages, or an object with one of `prompt_files.FIELDS` (the first
          that is there). ``.json``: a list of those, or JSON Lines. ``.csv``: with a header that
          names one of them. ``.parquet``: with such a column.
        - the name of one of the `PRESETS`.
        - ``hf:NAME[:CONFIG][@SPLIT][#COLUMN]``, where NAME is a hub id (owner/name) or a local
          folder that the datasets library reads. The split is "train" where none is named.
    column
        The field or column with the prompts, not the first known one; presets have their own.

    Returns
    -------
    list of str
        In the order of the source, with repetitions.

    Raises
    ------
    InputError
        If the file is missing, not of these forms, or holds no prompt; if the dataset cannot be
        had, with the first line of the reason.
    """
    if isinstance(source, str) and not os.path.exists(source):
        if "+" in source:
            return [prompt for part in source.split("+") for prompt in read_prompts(part, column)]
        if source.lower() in PRESETS:
            return read_dataset(PRESETS[source.lower()])
        if source.startswith("hf:"):
            dataset = _parsed_spec(source)
            return read_dataset(replace(dataset, column=dataset.column or column))
    if Path(source).suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{source} is no prompt file; expected one of {', '.join(SUFFIXES)}, "
            f"hf:OWNER/NAME[:CONFIG][@SPLIT][#COLUMN], or one of {', '.join(PRESETS)}"
        )
    return read_file(Path(source), column)


def _parsed_spec(source: str) -> Dataset:
    match = _SPEC.fullmatch(source)
    if match is None:
        raise InputError(
            f"{source!r} names no dataset; expected hf:OWNER/NAME[:CONFIG][@SPLIT][#COLUMN]"
        )
    return Dataset(
        match["name"], match["config"], match["split"] or "train", match["column"] or None
    )


def read_dataset(dataset: Dataset) -> list[str]:
    """Read the prompts of a dataset with the datasets library, from the hub or a local folder."""
    table, name = _loaded(dataset)
    column = dataset.column or find_field(table.column_names)
    about = find_input(table.column_names, dataset.column)
    if about is not None and dataset.where is None:
        dataset = replace(dataset, where={about: ""})
    prompts = [
        check_prompt(prompt, f"the dataset {name}, row {i}")
        for i, (prompt,) in _rows(table, dataset, name, [column])
    ]
    if not prompts:
        raise InputError(f"the dataset {name} holds no prompt; expected one at least")
    return prompts


def read_columns(
    dataset: Dataset, columns: Sequence[str], count: int, *, shuffle: int | None = None
) -> list[tuple[str, ...]]:
    """Read columns of the first `count` rows that have text in all of them; `column` is not used.

    With a seed to shuffle by, the rows are shuffled before with the library's own generator.
    Without it the dataset is streamed, and only what is needed is fetched.
    """
    table, name = _loaded(dataset, stream=shuffle is None)
    if shuffle is not None:
        table = table.shuffle(seed=shuffle)
    rows: list[tuple[str, ...]] = []
    try:
        for _, row in _rows(table, dataset, name, columns):
            if len(rows) == count:
                break
            if all(isinstance(text, str) and text.strip() for text in row):
                rows.append(tuple(row))
    except InputError:
        raise
    except Exception as error:  # a stream is fetched here
        raise InputError(f"the dataset {name} cannot be loaded: {first_line(error)}") from None
    return rows


def _loaded(dataset: Dataset, stream: bool = False) -> tuple[Any, str]:
    """Load a dataset; return it and its name."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            "datasets by name need the datasets library; expected "
            'pip install "refusal-kernels[research]"'
        ) from None
    datasets.disable_progress_bars()
    name = dataset.name + (f" ({dataset.config})" if dataset.config else "")
    options = {"streaming": True} if stream else {}
    try:
        table = datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, **options)
    except Exception as error:  # whatever a network, a hub, or a damaged file can bring
        raise InputError(f"the dataset {name} cannot be loaded: {first_line(error)}") from None
    return table, name


def _rows(
    table: Any, dataset: Dataset, name: str, columns: Sequence[str | None]
) -> Iterator[tuple[int, list[Any]]]:
    """The rows that the dataset means, with their numbers: what stands in the columns."""
    where = dataset.where or {}
    there = table.column_names or list(next(iter(table), {}))  # a stream may not know them yet
    for column in (*columns, *where):
        if column not in there:
            raise InputError(
                f"the dataset {name} has no column {column or 'of prompts'}; "
                f"it has {', '.join(there)}: name one with #COLUMN"
            )
    for i, row in enumerate(table.select_columns(list({*columns, *where}))):
        if all(str(row[key] or "").strip() == value for key, value in where.items()):
            yield i, [row[column] for column in columns]


def split_prompts(
    prompts: Sequence[str], sizes: Mapping[str, int | None], seed: int = SEED
) -> dict[str, list[str]]:
    """Cut prompts into disjoint parts that depend on the seed and on nothing else.

    Repetitions are dropped first (white space around a prompt does not count). The order is that of
    a hash of seed and prompt: the same on every machine and in every version of Python, and
    whatever the order of the source. A last size of None takes all prompts that are left.
    """
    different = list({prompt.strip(): prompt for prompt in reversed(prompts)}.values())
    need = sum(size or 0 for size in sizes.values())
    if len(different) < need or any((size or 0) < 0 for size in sizes.values()):
        raise InputError(
            f"{len(different)} different prompts; expected {need} or more, to be cut into "
            + ", ".join(f"{name} {size}" for name, size in sizes.items())
        )

    def key(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{prompt.strip()}".encode()).digest()

    ordered = sorted(different, key=key)
    parts, start = {}, 0
    for name, size in sizes.items():
        end = len(ordered) if size is None else start + size
        parts[name] = ordered[start:end]
        start = end
    return parts


def split_sizes(count: int) -> dict[str, int]:
    """How a set of prompts is cut: `SIZES`, or half, a quarter and the rest of a smaller set."""
    if count < 3:
        raise InputError(
            f"{count} different prompts; expected 3 or more, for train, validation and test"
        )
    train, validation = max(1, count // 2), max(1, count // 4)
    train, validation = min(SIZES["train"], train), min(SIZES["validation"], validation)
    test = min(SIZES["test"], count - train - validation)
    return {"train": train, "validation": validation, "test": test}
