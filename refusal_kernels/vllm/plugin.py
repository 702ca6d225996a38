"""The entry point of the plugin: it waits for an engine that asks for steering.

Two constructors of vLLM are hooked. Nothing else is imported or changed until one of them is called
with settings for this plugin.
"""

import logging
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
            logger.warning("refusal_kernels can not steer: %s", error)


def _start_front_end(processor: Any, vllm_config: Any, *_: Any, **__: Any) -> None:
    if _asks_for_steering(vllm_config):
        from refusal_kernels.vllm import frontend_hooks

        frontend_hooks.start(processor, vllm_config)


def _start_worker(worker: Any, *_: Any, **__: Any) -> None:
    if _asks_for_steering(worker.vllm_config):
        from refusal_kernels.vllm import worker_hooks

        worker_hooks.start(worker)


def _asks_for_steering(vllm_config: Any) -> bool:
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or KEY not in additional:
        return False
    if faults:
        raise InputError(faults[0])
    return True


PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
WORKER = "vllm.v1.worker.worker_base:WorkerBase"
CONSTRUCTORS = (
    # before it, because it keeps references to the processor's methods
    Hook(PROCESSOR, "__init__", BEFORE, _start_front_end, "to read the programs"),
    Hook(WORKER, "__init__", AFTER, _start_worker, "to follow the worker's model"),
)
