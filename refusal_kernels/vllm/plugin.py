"""What is changed in vLLM itself: a few methods, each of which looks for the plugin's state first.

An engine that does not ask for steering gets its own methods' results, from its own modules.
"""

import functools
from collections.abc import Callable
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.requests import STEER

MARK = "__refusal_kernels__"


def register() -> None:
    """The entry point: vLLM calls it in every process, also several times."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    _after(InputProcessor, "__init__", _read_programs)
    _after(InputProcessor, "process_inputs", _resolve)
    _before(AsyncLLM, "generate", _validate)
    _after(AsyncLLM, "__init__", _export)
    _after(GPUModelRunner, "load_model", _attach)
    _after(GPUModelRunner, "_prepare_inputs", _route)
    _after(GPUModelRunner, "_update_states", _forget)
    _after(GPUModelRunner, "_model_forward", _count)
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner
        from vllm.v1.worker.cpu_worker import CPUWorker

        _after(CPUModelRunner, "load_model", _attach)
        _after(CPUWorker, "compile_or_warm_up_model", _check)
    else:
        from vllm.v1.worker.gpu_worker import Worker

        _after(Worker, "compile_or_warm_up_model", _check)
    WorkerBase.refusal_kernels_update = _update
    WorkerBase.refusal_kernels_monitor = _monitor


def _after(owner: Any, name: str, then: Callable[..., Any]) -> None:
    """Let a method be followed by ``then(self, its result, its arguments)``, once."""
    original = owner.__dict__[name]
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        then(self, result, *args, **kwargs)
        return result

    setattr(followed, MARK, True)
    setattr(owner, name, followed)


def _before(owner: Any, name: str, first: Callable[..., Any]) -> None:
    """Let a method be preceded by ``first(self, its arguments)``, once."""
    original = owner.__dict__[name]
    if hasattr(original, MARK):
        return

    @functools.wraps(original)
    def preceded(self: Any, *args: Any, **kwargs: Any) -> Any:
        first(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(preceded, MARK, True)
    setattr(owner, name, preceded)


# --- the front end


def _read_programs(processor: Any, _: None, *__: Any, **___: Any) -> None:
    from refusal_kernels.vllm.frontend import Catalog

    processor.refusal_kernels = Catalog.of(processor.vllm_config)


def _resolve(processor: Any, request: Any, *_: Any, **__: Any) -> None:
    if (catalog := getattr(processor, "refusal_kernels", None)) is not None:
        try:
            catalog.resolve(request)
        except InputError as error:
            raise _refusal()(str(error), parameter=STEER) from None


def _validate(engine: Any, prompt: Any, sampling_params: Any, *_: Any, **__: Any) -> None:
    """Refuse a request when it is handed over: once a stream has begun, its status is sent."""
    catalog = getattr(engine.input_processor, "refusal_kernels", None)
    if catalog is not None:
        try:
            catalog.read(getattr(sampling_params, "extra_args", None))
        except InputError as error:
            raise _refusal()(str(error), parameter=STEER) from None


def _export(engine: Any, _: None, *__: Any, **___: Any) -> None:
    """Before a server is built round an engine with a monitor, see to its ``/metrics``."""
    catalog = getattr(engine.input_processor, "refusal_kernels", None)
    if catalog is not None and catalog.monitor is not None:
        from vllm.entrypoints.serve.instrumentator import metrics

        from refusal_kernels.vllm.metrics import export

        _after(metrics, "attach_router", export)


@functools.cache
def _refusal() -> Any:
    """Make the error that the server answers with status 400, and that is a ValueError too."""
    from vllm.exceptions import VLLMValidationError

    return type("SteeringError", (VLLMValidationError, ValueError), {})


# --- the worker


def _attach(runner: Any, _: Any, *__: Any, **___: Any) -> None:
    from refusal_kernels.vllm.worker import attach

    attach(runner)


def _route(runner: Any, _: Any, scheduler_output: Any, counts: Any, *__: Any) -> None:
    from refusal_kernels.vllm.worker import state_of

    if (state := state_of(runner)) is not None:
        state.route(runner.input_batch.req_ids, runner.requests, counts)


def _forget(runner: Any, _: Any, scheduler_output: Any, *__: Any) -> None:
    from refusal_kernels.vllm.worker import state_of

    if (state := state_of(runner)) is not None:
        state.forget(scheduler_output.finished_req_ids)


def _count(runner: Any, _: Any, *__: Any, **___: Any) -> None:
    from refusal_kernels.vllm.worker import state_of

    if (state := state_of(runner)) is not None:
        state.count()


def _check(worker: Any, _: Any, *__: Any) -> None:
    from refusal_kernels.vllm.worker import check_attached

    check_attached(worker)


def _update(worker: Any, *args: Any) -> Any:
    from refusal_kernels.vllm.worker import update_programs

    return update_programs(worker, *args)


def _monitor(worker: Any) -> Any:
    from refusal_kernels.vllm.worker import read_monitor

    return read_monitor(worker)
