"""The vLLM plugin: steering per request, in an engine that costs what it cost before.

Installed beside vLLM it does nothing until an engine asks for it, with
``additional_config={"refusal_kernels": {...}}``; docs/serving.md describes that.
"""

from refusal_kernels.vllm.frontend import read_monitor, set_programs, set_programs_async


def register() -> None:
    """The entry point in the group ``vllm.general_plugins``."""
    from refusal_kernels.vllm import plugin

    plugin.register()


__all__ = ["read_monitor", "register", "set_programs", "set_programs_async"]
