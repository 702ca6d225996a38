"""Files of prompts: text, JSON, JSON Lines, CSV and Parquet."""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from refusal_kernels.errors import InputError, first_line
from refusal_kernels.files.atomic import LIMIT_BYTES, check_size, parse_json, read_text
from refusal_kernels.hf.conversation import read_turns

# The columns that hold a prompt, as public sets name them, the best first: in JailbreakBench's
# files "Behavior" is only a title of the "Goal". Upper and lower case are the same.
FIELDS = (
    *("prompt", "instruction", "text", "goal", "behavior"),
    *("question", "query", "forbidden_prompt", "messages", "conversations", "conversation"),
)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
LONGEST_PROMPT = 131_072  # characters; also what Python's csv module takes in a field
MOST_LINES = 1_000_000


def read_file(path: Path, column: str | None = None) -> list[str]:
    """Read the prompts of a file, from a column or the first of `FIELDS` that is there.

    A prompt of several turns is a `refusal_kernels.hf.conversation.Conversation`.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        prompts = _from_parquet(path, column)
    else:
        text = read_text(path, "a prompt file")
        if suffix != ".json" and max(map(text.count, "\n\r,")) > MOST_LINES:
            raise InputError(f"{path} is too large; expected at most {MOST_LINES} lines")
        if suffix == ".csv":
            prompts = _from_csv(text, path, column)
        elif suffix == ".txt":
            prompts = [check_prompt(line, where) for line, where in _lines(text, path)]
        else:
            records = _json_lines(text, path) if suffix == ".jsonl" else _json(text, path)
            prompts = [
                _prompt_of(record, where, column)
                for record, where in records
                if not (isinstance(record, dict) and record.get(find_input(record, column)))
            ]
    if not prompts:
        raise InputError(f"{path} holds no prompt; expected one at least")
    return prompts


def find_field(names: Iterable[str], column: str | None = None) -> str | None:
    """Return the name that holds the prompts, or None."""
    by_lower_case = {name.lower(): name for name in reversed(list(names))}
    wanted = FIELDS if column is None else (column.lower(),)
    return next((by_lower_case[field] for field in wanted if field in by_lower_case), None)


def find_input(names: Iterable[str], column: str | None = None) -> str | None:
    """Return the field with what an instruction is about, as in Alpaca's files; None without one.

    Rows that have something there are left out, as the paper does: the instruction alone asks for
    something that is not there. A named column is taken as it is.
    """
    names = list(names)
    if column is not None or str(find_field(names)).lower() != "instruction":
        return None
    return next((name for name in names if name.lower() == "input"), None)


def check_prompt(prompt: Any, where: str) -> str:
    """Return a prompt, or refuse what is none; `where` begins the message.

    A list of messages is a prompt of several turns.
    """
    if isinstance(prompt, list):
        try:
            prompt = read_turns(prompt)
        except InputError as error:
            raise InputError(f"{where} holds {error}") from None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(
            f"{where} holds no prompt; expected a string, a list of messages, or an object with "
            f"one of the fields {', '.join(FIELDS)}"
        )
    if len(prompt) > LONGEST_PROMPT:
        raise InputError(
            f"{where} holds a prompt of {len(prompt)} characters; expected {LONGEST_PROMPT} at most"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:  # JSON can spell half a character, which no tokenizer takes
        raise InputError(f"{where} holds a lone surrogate; expected Unicode text") from None
    return prompt


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """Give the lines that are not blank, each with its place."""
    # Split at line feeds only: a JSON string may hold other separators, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line.strip(), f"{path}:{number}"


def _json_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    return ((parse_json(line, where), where) for line, where in _lines(text, path))


def _json(text: str, path: Path) -> list[tuple[Any, str]]:
    """Return the items of a list, or of JSON Lines under this suffix."""
    try:
        records = parse_json(text, str(path))
    except InputError as error:
        try:
            lines = list(_json_lines(text, path))
        except InputError:
            lines = []
        if not lines:
            raise error
        return lines
    if not isinstance(records, list):
        raise InputError(f"{path} holds a {type(records).__name__}; expected a list of prompts")
    return [(record, f"{path}, item {i}") for i, record in enumerate(records)]


def _from_csv(text: str, path: Path, column: str | None) -> list[str]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        place = header.index(_column(header, column, path))
        about = find_input(header, column)
        more = len(header) if about is None else header.index(about)
        return [
            check_prompt(row[place] if place < len(row) else "", f"{path}, line {rows.line_num}")
            for row in rows
            if any(row) and not any(row[more : more + 1])
        ]
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}, is no CSV: {error}") from None


def _from_parquet(path: Path, column: str | None) -> list[str]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            f'{path} needs pyarrow; expected pip install "refusal-kernels[research]"'
        ) from None
    check_size(path, "a prompt file", LIMIT_BYTES)
    try:
        file = parquet.ParquetFile(path)
        name = _column(file.schema_arrow.names, column, path)
        if file.metadata.num_rows > MOST_LINES:
            raise InputError(f"{path} is too large; expected at most {MOST_LINES} rows")
        about = find_input(file.schema_arrow.names, column) or name
        table = file.read([name, about])
        values, inputs = table.column(name).to_pylist(), table.column(about).to_pylist()
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file can bring
        raise InputError(f"{path} is no Parquet file: {first_line(error)}") from None
    return [
        check_prompt(value, f"{path}, row {i}")
        for i, (value, more) in enumerate(zip(values, inputs, strict=True))
        if about == name or not more
    ]


def _column(names: list[str], column: str | None, path: Path) -> str:
    field = find_field(names, column)
    if field is None:
        wanted = f"the column {column}" if column else f"one of the columns {', '.join(FIELDS)}"
        raise InputError(
            f"{path} has no header with {wanted}; it has {', '.join(names) or 'none'}: "
            "name one with --column"
        )
    return field


def _prompt_of(record: Any, where: str, column: str | None) -> str:
    if isinstance(record, dict):
        field = find_field(record, column)
        if field is None and column is not None:
            raise InputError(f"{where} has no column {column}; it has {', '.join(record)}")
        record = None if field is None else record[field]
    return check_prompt(record, where)
