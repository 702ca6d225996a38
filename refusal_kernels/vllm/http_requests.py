"""Requests of vLLM's HTTP server: what would be served unsteered without a word is refused."""

from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.names import STEER, STRENGTH
from refusal_kernels.vllm.requests import refuse_misspelt

XARGS = "vllm_xargs"  # the field of a request whose content becomes its extra_args


def check_request(request: Any) -> None:
    """Refuse a request whose steering vLLM would not hand on.

    Parameters
    ----------
    request
        A request as vLLM's server has parsed it; fields that it does not know are in
        ``model_extra``.

    Raises
    ------
    InputError
        If steering is named outside ``vllm_xargs``, or in a beam search.
    """
    for name, value in (getattr(request, "model_extra", None) or {}).items():
        if name in (STEER, STRENGTH):
            raise InputError(f"the request has {name!r} outside {XARGS!r}; expected it inside")
        refuse_misspelt([name])
        if isinstance(value, dict) and {STEER, STRENGTH} & set(value):
            raise InputError(f"the request has {STEER!r} in {name!r}; expected it in {XARGS!r}")
    extra = getattr(request, XARGS, None) or {}
    if getattr(request, "use_beam_search", False) and {STEER, STRENGTH} & set(extra):
        raise InputError(
            f"a beam search takes no {STEER!r}: vLLM gives no extra arguments to its steps; only "
            "the engine's default program steers it"
        )
