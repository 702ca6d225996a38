"""Result files: JSON lines. The first line says device, versions and commit, each other is a row.

What is None or usual is left out, and numbers have six significant digits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json, read_text, replacing

RENAMED = {"orthogonalised": "orthogonalized"}  # values of older files


def header(what: str, device: str = "cpu") -> dict[str, Any]:
    """Return what the first line of every file says."""
    return {"what": what, "device": describe_device(device), "versions": versions()}


def rounded(value: Any) -> Any:
    """Return a document whose floats have six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_records(path: Path, document: Mapping[str, Any], usual: Mapping[str, Any] = {}) -> None:
    """Write a document, replacing the file in one step: its "rows" follow all the rest.

    Fields of a row that have the ``usual`` value are left out; `read_records` puts them back.
    """
    head = {name: value for name, value in document.items() if name != "rows"}
    rows = [{k: v for k, v in row.items() if v != usual.get(k)} for row in document["rows"]]
    lines = [
        json.dumps(
            {k: v for k, v in rounded(line).items() if v is not None},
            allow_nan=False,
            separators=(",", ":"),
        )
        for line in (head, *rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_records(path: Path, usual: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return the document of a file, also of an older one that is a single JSON object.

    Fields that a row does not have get their ``usual`` value.
    """
    text = read_text(path, "a result file")
    if text.startswith("{\n"):
        document = parse_json(text, str(path))
    else:
        lines = [
            parse_json(line, f"{path}, line {number}")
            for number, line in enumerate(text.splitlines(), 1)
        ]
        document = {**lines[0], "rows": lines[1:]} if lines and isinstance(lines[0], dict) else {}
    rows = document.get("rows")
    headed = isinstance(document.get("versions"), dict) and isinstance(rows, list)
    if not headed or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no results: expected a header line, then a row a line")
    document["rows"] = [
        {**usual, **{k: RENAMED.get(v, v) if isinstance(v, str) else v for k, v in row.items()}}
        for row in rows
    ]
    return document
