"""The vLLM plugin: a steering program for each request.

Installed beside vLLM it does nothing until an engine asks for it, with
``additional_config={"refusal_kernels": {...}}``; docs/serving.md describes that.
"""

from typing import Any

from refusal_kernels.vllm.plugin import register

__all__ = ["read_monitor", "register", "set_programs", "set_programs_async"]


def __getattr__(name: str) -> Any:
    """Load the public functions when they are first used: the entry point stays light."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from refusal_kernels.vllm import frontend

    return getattr(frontend, name)
