"""Load a PEFT adapter into a model."""

import warnings
from typing import Any

from refusal_kernels.errors import InputError, first_line


def add_adapter(
    model: Any, adapter: str, *, offline: bool = False, revision: str | None = None
) -> Any:
    """Merge an adapter into a model's weights, in their dtype, or attach it where they are packed.

    Parameters
    ----------
    model
        A transformers model.
    adapter
        A PEFT folder, or a repository of the hub.
    offline
        Whether only files on this machine are used.
    revision
        A branch, tag or commit of the repository.

    Returns
    -------
    model
        The plain model with other weights. It is a ``PeftModel`` if the weights are quantized or
        split between processes, or the adapter is a soft prompt, which has no place in them.

    Raises
    ------
    InputError
        If PEFT is not installed, or the adapter is none for this model.
    """
    try:
        from peft import PeftModel, PeftType, load_peft_weights, set_peft_model_state_dict
    except ImportError:
        raise InputError(f"the adapter '{adapter}' needs PEFT: pip install peft") from None
    source: dict[str, Any] = {"local_files_only": offline, "revision": revision}
    plain = not getattr(model, "is_quantized", False) and (getattr(model, "tp_size", None) or 1) < 2
    try:
        with warnings.catch_warnings():
            # what the file lacks keeps its initial values, and PEFT only warns
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, adapter, **source)
        config = adapted.active_peft_config
        prompt = config.is_prompt_learning
        if not prompt:
            if config.peft_type == PeftType.ADALORA:
                config.rank_pattern = None  # its modules have these sizes now
            # what the file holds and the adapter has no place for, PEFT drops without a word
            weights = load_peft_weights(adapter, device="cpu", **source)
            loaded: Any = set_peft_model_state_dict(adapted, weights)
            if dropped := loaded.unexpected_keys:
                raise InputError(
                    f"its file holds {dropped[0]}, which its configuration has no place for"
                )
        return adapted.merge_and_unload() if plain and not prompt else adapted
    except Exception as error:  # whatever a hub, a config or a damaged file can bring
        raise InputError(f"the adapter '{adapter}' does not fit: {first_line(error)}") from None
