"""Runs an examination over families of models, and keeps its table on a page of the docs.

The table stands between ``<!-- generated -->`` and ``<!-- end -->``; what is around it is prose.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny_families
import torch
import transformers

DOCS = Path(__file__).parents[2] / "docs"
TABLE = re.compile(r"(?<=<!-- generated -->\n).*(?=<!-- end -->)", re.DOTALL)


def rows(page: str) -> list[list[str]]:
    """Return the cells of every row of a page's table."""
    table = TABLE.search((DOCS / page).read_text())
    lines = table[0].splitlines() if table else []
    return [line.strip("| ").split(" | ") for line in lines if " | " in line][1:]


def run(
    page: str,
    examine: Callable[[str], Any],
    summary: Callable[[list[Any]], Sequence[str]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Examine families, print a line for each, and write the table.

    Parameters
    ----------
    page
        A file of docs/.
    examine
        Given a model type, a finding with `row()`, `numbers()` and `failed`.
    summary
        Given all findings, the lines before the rows: counts, and the head of the table.

    Returns
    -------
    int
        The exit code: 1 if a family failed.
    """
    parser = argparse.ArgumentParser(description=f"The table of docs/{page}.")
    parser.add_argument("model_types", nargs="*", default=[], metavar="MODEL_TYPE")
    parser.add_argument("--write", action="store_true", help="write the table (all families)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    findings = []
    for model_type in options.model_types or tiny_families.MODEL_TYPES:
        findings.append(examine(model_type))
        print(findings[-1].row(), findings[-1].numbers(), flush=True)
    if options.write:
        table = "\n".join([*summary(findings), *(f.row() for f in findings)]) + "\n"
        path = DOCS / page
        path.write_text(TABLE.sub(lambda _: table, path.read_text()))
    return int(any(f.failed for f in findings))
