"""Settings in a file: JSON or TOML, as ``additional_config={"refusal_kernels": {"file": ...}}``."""

import os
from pathlib import Path
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json, read_text

FILE = "file"  # the setting that names it
JOINED = ("directions", "programs")  # settings of which both may have a part


def with_file(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings together with those of the file that they name.

    Directions and programs are joined. Of all others, what stands beside the file takes precedence.

    Raises
    ------
    InputError
        If the file cannot be read, or both have a direction or a program of one name.
    """
    path = given.get(FILE)
    if path is None:
        return given
    if not isinstance(path, str):
        raise InputError(f"{FILE} is {path!r}; expected the path of a JSON or TOML file")
    written = read_settings_file(Path(path))
    settings = {**written, **{key: value for key, value in given.items() if key != FILE}}
    for key in JOINED:
        parts = written.get(key, {}), given.get(key, {})
        if not all(isinstance(part, dict) for part in parts):
            raise InputError(f"{key} of {path} must be an object, by name")
        if twice := sorted(set(parts[0]) & set(parts[1])):
            raise InputError(f"{twice[0]!r} of {key} is in {path} and beside it; expected one")
        settings[key] = {**parts[0], **parts[1]}
    return settings


def read_settings_file(path: Path) -> dict[str, Any]:
    """Read a settings file; the files that it names are looked up beside it."""
    text = read_text(path, "a JSON or TOML file")
    content = _parse_toml(text, path) if path.suffix == ".toml" else parse_json(text, str(path))
    if not isinstance(content, dict) or FILE in content:
        raise InputError(f"{path} must hold an object of settings, without {FILE!r}")
    files = content.get("directions")
    if isinstance(files, dict):
        content["directions"] = {
            name: os.path.join(path.parent, file) if isinstance(file, str) else file
            for name, file in files.items()
        }
    return content


def _parse_toml(text: str, path: Path) -> Any:
    try:
        import tomllib
    except ImportError:
        raise InputError(f"{path}: TOML needs Python 3.11; expected JSON") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
