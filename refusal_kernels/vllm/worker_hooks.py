"""What is hooked in a worker of an engine that asks for steering, and in its model runner.

vLLM chooses between two model runners (``VllmConfig.use_v2_model_runner``). Both say which requests
are new and which have ended before they prepare the inputs of a batch, and run no dummy batch
through either method.
"""

from typing import Any

from refusal_kernels.vllm.check import check
from refusal_kernels.vllm.config import read_settings
from refusal_kernels.vllm.hooks import AFTER, Hook, install
from refusal_kernels.vllm.names import (
    KEY,
    MONITOR,
    READING,
    SETTINGS,
    STATE,
    UPDATE,
    VERSIONS,
)
from refusal_kernels.vllm.worker import WorkerState


def start(worker: Any) -> None:
    """Put the hooks of a new worker in place."""
    settings = read_settings(worker.vllm_config)  # an error is raised before anything is loaded
    # taken out again: vLLM's compile cache is keyed by the configuration
    worker.vllm_config.additional_config[KEY].pop(VERSIONS, None)
    setattr(worker, SETTINGS, settings)
    install(WORKER_HOOKS, worker)


def _follow_runner(worker: Any, *_: Any, **__: Any) -> None:
    install(V2_HOOKS if worker.vllm_config.use_v2_model_runner else V1_HOOKS, worker.model_runner)


def _attach(worker: Any, *_: Any, **__: Any) -> None:
    state = WorkerState(worker.model_runner, getattr(worker, SETTINGS))
    setattr(worker.model_runner, STATE, state)
    setattr(worker, UPDATE, state.update_programs)
    setattr(worker, MONITOR, state.read_monitor)
    if state.reading is not None:
        model = worker.model_runner.get_model()
        setattr(worker, READING, state.reading.call)
        setattr(model, STATE, state)
        install(MODEL_HOOKS, model)


def _check(worker: Any, *_: Any, **__: Any) -> None:
    state = getattr(worker.model_runner, STATE)
    check(worker.model_runner, state)
    state.clear_monitor()


def _follow_requests(runner: Any, scheduler_output: Any, *_: Any, **__: Any) -> None:
    state = getattr(runner, STATE)
    state.forget(scheduler_output.finished_req_ids)
    for request in scheduler_output.scheduled_new_reqs:  # V2: those that were preempted too
        state.learn(request.req_id, request.sampling_params or request.pooling_params)


def _route_v1(runner: Any, scheduler_output: Any, counts: Any, *_: Any, **__: Any) -> None:
    batch = runner.input_batch
    computed = batch.num_computed_tokens_cpu[: len(counts)]
    getattr(runner, STATE).route(batch.req_ids, counts, computed, runner.positions)


def _route_v2(runner: Any, *_: Any, result: Any, **__: Any) -> None:
    starts = result.query_start_loc_np[: result.num_reqs + 1]
    counts = starts[1:] - starts[:-1]  # np.diff takes ten times as long
    computed = result.num_computed_tokens_np
    getattr(runner, STATE).route(result.req_ids, counts, computed, result.positions)


def _count(runner: Any, *_: Any, **__: Any) -> None:
    getattr(runner, STATE).count()


def _read_logits(model: Any, *_: Any, result: Any, **__: Any) -> None:
    getattr(model, STATE).reading.after_logits(result)


WORKER = "vllm.v1.worker.gpu_worker:Worker"  # and its subclass for CPUs
V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
WORKER_HOOKS = (
    Hook(WORKER, "init_device", AFTER, _follow_runner, "to follow its model runner"),
    Hook(WORKER, "load_model", AFTER, _attach, "to put the steered adds into the model"),
    Hook(WORKER, "compile_or_warm_up_model", AFTER, _check, "to check that they steer"),
)
V1_HOOKS = (
    Hook(V1, "_update_states", AFTER, _follow_requests, "to know which requests there are"),
    Hook(V1, "_prepare_inputs", AFTER, _route_v1, "to route the tokens of each batch"),
    Hook(V1, "_model_forward", AFTER, _count, "to count for the monitor"),
)
V2_HOOKS = (
    Hook(V2, "add_requests", AFTER, _follow_requests, "to know which requests there are"),
    Hook(V2, "prepare_inputs", AFTER, _route_v2, "to route the tokens of each batch"),
    Hook(V2, "execute_model", AFTER, _count, "to count for the monitor"),
)
MODEL_HOOKS = (
    Hook("the model", "compute_logits", AFTER, _read_logits, "to read the logits after a prompt"),
)
