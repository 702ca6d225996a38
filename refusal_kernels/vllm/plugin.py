"""The entry point of the plugin: it waits for an engine that asks for steering.

Two constructors of vLLM are hooked. Nothing else is imported or changed until one of them is called
with settings for this plugin.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.hooks import AFTER, BEFORE, Hook, install
from refusal_kernels.vllm.names import KEY

logger = logging.getLogger("vllm.refusal_kernels")  # so that vLLM's handlers print it
faults: list[str] = []  # constructors that this version of vLLM does not have


def register() -> None:
    """Hook the two constructors. vLLM calls this in every process and catches no exception."""
    faults.clear()
    for hook in CONSTRUCTORS:
        try:
            install([hook])
        except Exception as error:
            faults.append(str(error))
            logger.warning("refusal_kernels cannot steer: %s", error)


def _start_front_end(processor: Any, *args: Any, **kwargs: Any) -> None:
    vllm_config = kwargs.get("vllm_config", args[0] if args else None)
    with _one_line():
        if _asks_for_steering(vllm_config):
            from refusal_kernels.vllm import frontend_hooks

            frontend_hooks.start(processor, vllm_config)


def _start_worker(worker: Any, *_: Any, **__: Any) -> None:
    if _asks_for_steering(getattr(worker, "vllm_config", None)):
        from refusal_kernels.vllm import worker_hooks

        worker_hooks.start(worker)


def _asks_for_steering(vllm_config: Any) -> bool:
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict) or KEY not in additional:
        return False
    if faults:
        raise InputError(faults[0])
    return True


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Let a process that ends with the error of a refusal print one line, not a traceback."""
    try:
        yield
    except InputError as error:
        refusal, print_other = error, sys.excepthook

        def print_uncaught(kind: Any, value: Any, traceback: Any) -> None:
            if value is refusal:
                print(f"refusal_kernels: {value}", file=sys.stderr)
            else:
                print_other(kind, value, traceback)

        sys.excepthook = print_uncaught
        raise


PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
WORKER = "vllm.v1.worker.worker_base:WorkerBase"
CONSTRUCTORS = (
    # before it, because it keeps references to the processor's methods
    Hook(PROCESSOR, "__init__", BEFORE, _start_front_end, "to read the programs"),
    Hook(WORKER, "__init__", AFTER, _start_worker, "to follow the worker's model"),
)
