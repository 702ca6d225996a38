"""The front end's side: programs by name, and what every request asks for, before it is queued."""

from typing import Any

from refusal_kernels.vllm.config import Settings, read_settings
from refusal_kernels.vllm.requests import RESOLVED, cache_salt, read_steering


class Catalog:
    """The programs that requests can name."""

    def __init__(self, settings: Settings) -> None:
        self.programs = dict(settings.programs)
        self.directions = dict(settings.directions)
        self.default = settings.default
        self.slots = settings.slots

    @classmethod
    def of(cls, vllm_config: Any) -> "Catalog | None":
        """Return the catalog of an engine that asks for steering."""
        settings = read_settings(vllm_config)
        return None if settings is None else cls(settings)

    def resolve(self, request: Any) -> None:
        """Write into an ``EngineCoreRequest`` what is done to it, and salt its prefixes.

        Raises
        ------
        InputError
            If it asks for what is not there.
        """
        sampling, pooling = request.sampling_params, request.pooling_params
        extra = sampling.extra_args if sampling is not None else pooling.extra_kwargs
        steering = read_steering(extra, self.programs, self.default)
        if steering is None:
            return
        resolved = {**(extra or {}), RESOLVED: list(steering)}
        if sampling is not None:
            sampling.extra_args = resolved
        else:
            pooling.extra_kwargs = resolved
        request.cache_salt = cache_salt(request.cache_salt, steering)
