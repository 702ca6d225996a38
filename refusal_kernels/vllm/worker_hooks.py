"""What is hooked in a worker of an engine that asks for steering, and in its model runner."""

from typing import Any

from refusal_kernels.vllm.check import check
from refusal_kernels.vllm.config import read_settings
from refusal_kernels.vllm.hooks import AFTER, Hook, install
from refusal_kernels.vllm.names import MONITOR, STATE, UPDATE
from refusal_kernels.vllm.worker import WorkerState


def start(worker: Any) -> None:
    """Put the hooks of a new worker in place."""
    read_settings(worker.vllm_config)  # an error is raised before anything is loaded
    install(WORKER_HOOKS, worker)


def _follow_runner(worker: Any, *_: Any, **__: Any) -> None:
    install(RUNNER_HOOKS, worker.model_runner)


def _attach(worker: Any, *_: Any, **__: Any) -> None:
    state = WorkerState(worker.model_runner, read_settings(worker.vllm_config))
    setattr(worker.model_runner, STATE, state)
    setattr(worker, UPDATE, state.update_programs)
    setattr(worker, MONITOR, state.read_monitor)


def _check(worker: Any, *_: Any, **__: Any) -> None:
    check(worker.model_runner, getattr(worker.model_runner, STATE))


def _route(runner: Any, scheduler_output: Any, counts: Any, *_: Any, **__: Any) -> None:
    getattr(runner, STATE).route(runner.input_batch.req_ids, runner.requests, counts)


def _forget(runner: Any, scheduler_output: Any, *_: Any, **__: Any) -> None:
    getattr(runner, STATE).forget(scheduler_output.finished_req_ids)


def _count(runner: Any, *_: Any, **__: Any) -> None:
    getattr(runner, STATE).count()


WORKER = "vllm.v1.worker.gpu_worker:Worker"  # and its subclass for CPUs
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
WORKER_HOOKS = (
    Hook(WORKER, "init_device", AFTER, _follow_runner, "to follow its model runner"),
    Hook(WORKER, "load_model", AFTER, _attach, "to put the steered adds into the model"),
    Hook(WORKER, "compile_or_warm_up_model", AFTER, _check, "to check that they steer"),
)
RUNNER_HOOKS = (
    Hook(RUNNER, "_prepare_inputs", AFTER, _route, "to route the tokens of each batch"),
    Hook(RUNNER, "_update_states", AFTER, _forget, "to forget requests that ended"),
    Hook(RUNNER, "_model_forward", AFTER, _count, "to count for the monitor"),
)
