"""What reads files from anyone, by their names: also for a process with a limit of memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from refusal_kernels.cli.evaluate import read_selection
from refusal_kernels.files import convert
from refusal_kernels.files.atomic import read_json
from refusal_kernels.research.evaluation.likelihood import read_texts
from refusal_kernels.research.evaluation.tasks import read_pairs
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.reproduction.rows import read_row
from refusal_kernels.research.sources import read_prompts

WORDS: dict[str, Callable[[Path], Any]] = {
    "pairs": read_pairs,
    "texts": read_texts,
    "selection": read_selection,
    "row": read_row,
    "document": read_json,
    "moments": Moments.load,
}


def read(path: Path) -> Any:
    """Read a file with the reader that its name is for, by a word in it or by its suffix."""
    default = read_prompts if path.suffix in (".json", ".jsonl", ".csv", ".txt") else convert.read
    return next((WORDS[word] for word in WORDS if word in path.name), default)(path)
