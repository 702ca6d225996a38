"""HTTP routes that list and change the programs of a running server, and SIGHUP.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them. The routes are below ``/v1``,
which ``--api-key`` guards.
"""

import asyncio
import logging
import signal
from typing import Any

import torch

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import parse_json
from refusal_kernels.vllm.frontend import (
    catalog_of,
    reload_programs_async,
    set_programs_async,
)
from refusal_kernels.vllm.settings_file import FILE

logger = logging.getLogger("vllm.refusal_kernels")  # so that vLLM's handlers print it
PATH = "/v1/refusal_kernels/programs"
RELOAD = "/v1/refusal_kernels/reload"
MOST_BYTES = 16 << 20  # of a request: a direction of hidden size 16384 takes 0.4 MB of JSON


class Endpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "refusal_kernels"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        app.get(PATH)(_list)
        app.post(PATH)(_change)
        app.post(RELOAD)(_reload)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine for the routes, and reload its file of settings on SIGHUP."""
        state.refusal_kernels_engine = engine_client
        try:
            given = catalog_of(engine_client).settings.given
        except InputError:  # nothing to reload
            return
        if FILE in given:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, _hang_up, engine_client, given[FILE])


def _hang_up(engine: Any, file: str) -> None:
    """Reload the settings, and say in the log what came of it."""

    async def reload() -> None:
        try:
            await reload_programs_async(engine)
            logger.info("refusal_kernels: programs reloaded from %s", file)
        except InputError as error:
            logger.error("refusal_kernels: the programs stay as they were: %s", error)

    task = asyncio.get_running_loop().create_task(reload())
    _reloads.add(task)  # the loop holds tasks weakly
    task.add_done_callback(_reloads.discard)


_reloads: set[asyncio.Task[None]] = set()


try:  # FastAPI reads the annotations of the routes, so these names must be global
    from fastapi import Request
    from fastapi.responses import JSONResponse
except ImportError:  # without vLLM there is no server
    Request = JSONResponse = Any


async def _list(request: Request) -> JSONResponse:
    """GET: the programs, with their versions, and the default."""
    try:
        return _answer(catalog_of(request.app.state.refusal_kernels_engine))
    except InputError as error:
        return _refusal(error)


async def _change(request: Request) -> JSONResponse:
    """POST ``{"programs": {name: program or null}, "directions": {name: [numbers]}}``."""
    engine = request.app.state.refusal_kernels_engine
    try:
        programs, directions = await _read(request)
        await set_programs_async(engine, programs, directions)
        return _answer(catalog_of(engine))
    except InputError as error:
        return _refusal(error)


async def _reload(request: Request) -> JSONResponse:
    """POST: read the file of settings again."""
    engine = request.app.state.refusal_kernels_engine
    try:
        await reload_programs_async(engine)
        return _answer(catalog_of(engine))
    except InputError as error:
        return _refusal(error)


async def _read(request: Request) -> tuple[dict[str, Any], dict[str, Direction]]:
    """Read and check the body of a request."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise InputError(f"the request has more than {MOST_BYTES} bytes")
    given = parse_json(body.decode("utf-8", "replace"), "the request")
    if not isinstance(given, dict) or not set(given) <= {"programs", "directions"}:
        raise InputError("the request must be an object with programs and directions")
    programs, vectors = given.get("programs", {}), given.get("directions", {})
    if not isinstance(programs, dict) or not isinstance(vectors, dict):
        raise InputError("programs and directions must be objects, by name")
    directions = {}
    for name, numbers in vectors.items():
        if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
            raise InputError(f"direction {name!r} must be a list of numbers")
        directions[name] = Direction(torch.tensor(numbers, dtype=torch.float32))
    return programs, directions


def _answer(catalog: Any) -> JSONResponse:
    programs, directions = catalog.programs, sorted(catalog.directions)
    return JSONResponse(
        {
            "programs": {name: program.version for name, program in programs.items()},
            "strengths": {name: list(program.strengths) for name, program in programs.items()},
            "default": catalog.default,
            "directions": directions,
        }
    )


def _refusal(error: InputError) -> JSONResponse:
    problem = {"message": str(error), "type": "BadRequestError", "code": 400}
    return JSONResponse({"error": problem}, status_code=400)
