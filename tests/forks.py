"""Child processes that start in milliseconds: forked from a server that has everything loaded.

What they do stands in `fork_child.py`, which only they import.
"""

import importlib
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fork_child"])


def start(function: str, *arguments: Any) -> tuple[Any, Any]:
    """Start a function of `fork_child` in a child; its last argument is a connection to us.

    Returns the process, and the connection, which ends when the child does.
    """
    with pytest.MonkeyPatch.context() as patched:  # where the server finds what it imports
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    listen, tell = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_call, args=(function, *arguments, tell))
    process.start()
    tell.close()
    return process, listen


def everything(listen: Any) -> list[Any]:
    """What a child says until it ends."""
    found = []
    try:
        while True:
            found.append(listen.recv())
    except EOFError:
        return found


def _call(function: str, *arguments: Any) -> None:
    getattr(importlib.import_module("fork_child"), function)(*arguments)
