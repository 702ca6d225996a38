"""What is hooked in the front end of an engine that asks for steering."""

import contextlib
from collections.abc import Iterator
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm import metrics
from refusal_kernels.vllm.config import read_settings
from refusal_kernels.vllm.counters import REFUSED, counter
from refusal_kernels.vllm.frontend import Catalog, following
from refusal_kernels.vllm.hooks import AFTER, BEFORE, Hook, install
from refusal_kernels.vllm.http_requests import XARGS, check_request, list_programs, resolve_model
from refusal_kernels.vllm.names import CATALOG, KEY, STEER, VERSIONS


def start(processor: Any, vllm_config: Any) -> None:
    """Give a front end's ``InputProcessor`` a catalog of programs, and put the hooks in place."""
    settings, servers = read_settings(vllm_config), vllm_config.parallel_config._api_process_count
    catalog = Catalog(settings, servers)
    setattr(processor, CATALOG, catalog)
    if (programs := following.get()) is not None:
        catalog.plan(*programs)
    # for the workers, which read the files themselves, later and perhaps on another machine
    vllm_config.additional_config[KEY][VERSIONS] = settings.versions
    install(FRONT_END_HOOKS)
    if settings.monitor is not None:
        install(SERVER_HOOKS)


def _resolve(processor: Any, *_: Any, result: Any, **__: Any) -> None:
    if (catalog := getattr(processor, CATALOG, None)) is not None:
        with _as_bad_request():
            catalog.resolve(result)


def _validate(engine: Any, prompt: Any, sampling_params: Any, *_: Any, **__: Any) -> None:
    if (catalog := getattr(engine.input_processor, CATALOG, None)) is not None:
        with _as_bad_request():
            catalog.read(getattr(sampling_params, "extra_args", None))


def _check_request(serving: Any, request: Any, *_: Any, **__: Any) -> None:
    models = serving.models
    if (catalog := _catalog_of_server(models)) is not None:
        served = [*(path.name for path in models.base_model_paths), *models.lora_requests]
        with _as_bad_request():
            resolve_model(request, served, catalog.programs)
            check_request(request, catalog.programs.get(catalog.default or ""))
            # a stream of responses has begun before the engine sees its request
            catalog.read(getattr(request, XARGS, None))


def _list_programs(models: Any, *_: Any, result: Any, **__: Any) -> None:
    if (catalog := _catalog_of_server(models)) is not None:
        list_programs(result.data, catalog.programs, catalog.default)


def _catalog_of_server(models: Any) -> Catalog | None:
    """Return the catalog of a server's ``OpenAIServingModels``, if its engine has one."""
    catalog: Catalog | None = getattr(getattr(models, "input_processor", None), CATALOG, None)
    return catalog


def _export(app: Any, **_: Any) -> None:
    metrics.export(app)


@contextlib.contextmanager
def _as_bad_request() -> Iterator[None]:
    """Turn an InputError into one that the server answers with status 400, a ValueError too."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except InputError as error:
        counter(REFUSED).inc()
        kind = type("SteeringError", (VLLMValidationError, ValueError), {})
        raise kind(str(error), parameter=STEER) from None


PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
SERVING = "vllm.entrypoints.serve.engine.serving:BaseServing"
POOLING = "vllm.entrypoints.pooling.base.serving:PoolingBaseServing"
MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
METRICS = "vllm.entrypoints.serve.instrumentator.metrics"
FRONT_END_HOOKS = (
    Hook(PROCESSOR, "process_inputs", AFTER, _resolve, "to give each request its program"),
    Hook(ENGINE, "generate", BEFORE, _validate, "to refuse a request before its stream begins"),
    Hook(SERVING, "_check_model", BEFORE, _check_request, "to read the requests of its server"),
    Hook(POOLING, "_check_model", BEFORE, _check_request, "to read those of its other endpoints"),
    Hook(MODELS, "show_available_models", AFTER, _list_programs, "to list programs as models"),
)
SERVER_HOOKS = (Hook(METRICS, "attach_router", AFTER, _export, "to show the monitor at /metrics"),)
