"""Engines in which the wrong tokens would be steered, or none: refused before they load."""

from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.families import architecture_of

SPLIT = "it splits the tokens of a batch"
# connectors whose keys have the salt of a prefix, or that move the blocks of one request
SALTED = (
    *("NixlConnector", "NixlPullConnector", "NixlPushConnector", "OffloadingConnector"),
    *("SimpleCPUOffloadConnector", "LMCacheMPConnector", "MooncakeStoreConnector"),
)


def refuse_unsupported(config: Any) -> None:
    """Refuse an engine that cannot be steered.

    Parameters
    ----------
    config
        A ``VllmConfig``.

    Raises
    ------
    InputError
        With the setting that prevents steering, or the architecture.
    """
    from vllm import envs

    parallel, drafts = config.parallel_config, config.speculative_config
    for set_, name, why in (
        (parallel.use_ubatching, "microbatches (enable_dbo, ubatch_size)", SPLIT),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallelism", SPLIT),
        (
            parallel.use_sequence_parallel_moe,
            "sequence-parallel experts (expert, tensor and data parallelism at once)",
            SPLIT,
        ),
        (
            drafts is not None and drafts.enable_adaptive_verification,
            "enable_adaptive_verification",
            "only the device knows which tokens are in a batch",
        ),
        (
            envs.VLLM_USE_RUST_FRONTEND,
            "VLLM_USE_RUST_FRONTEND",
            "it does not read which program a request names",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "VLLM_BATCH_INVARIANT",
            "its norms are replaced",
        ),
    ):
        if set_:
            raise InputError(f"steering does not support {name}: {why}")
    for name in _connectors(config.kv_transfer_config):
        if name not in SALTED:
            raise InputError(
                f"steering does not support {name}: it may share the keys and values of a prefix "
                f"between programs; expected one of {', '.join(SALTED)}"
            )
    architecture_of(config.model_config)


def _connectors(transfer: Any) -> list[str]:
    """Return the names of the connectors of a ``KVTransferConfig``, also those inside another."""
    if transfer is None or transfer.kv_connector is None:
        return []
    if transfer.kv_connector != "MultiConnector":
        return [transfer.kv_connector]
    inside = transfer.kv_connector_extra_config.get("connectors", [])
    return [str(given.get("kv_connector")) for given in inside]


def refuse_reading(config: Any) -> None:
    """Refuse an engine of which the experiment would read the wrong logits, or none.

    Raises
    ------
    InputError
        With the setting that prevents it.
    """
    for set_, name in (
        (config.speculative_config is not None, "speculative decoding"),
        (config.parallel_config.enable_batch_sharded_sampling, "enable_batch_sharded_sampling"),
    ):
        if set_:
            raise InputError(f"nothing can be read of requests with {name}; start it without")
