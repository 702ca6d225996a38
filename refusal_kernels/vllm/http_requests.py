"""Requests of vLLM's HTTP server: models named with a program, and what would be unsteered.

``"model": "NAME:PROGRAM"`` names a program too, so that every OpenAI client can choose one.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from refusal_kernels.errors import InputError
from refusal_kernels.vllm.names import FLAT, STEER
from refusal_kernels.vllm.programs import NONE, NamedProgram
from refusal_kernels.vllm.requests import refuse_misspelled

XARGS = "vllm_xargs"  # the field of a request whose content becomes its extra_args


def check_request(request: Any, default: NamedProgram | None = None) -> None:
    """Refuse a request whose steering vLLM would not hand on.

    Parameters
    ----------
    request
        A request as vLLM's server has parsed it; fields that it does not know are in
        ``model_extra``.
    default
        The program of requests that name none.

    Raises
    ------
    InputError
        If steering is named outside ``vllm_xargs``, or in a beam search.
    """
    takes_xargs = _takes_xargs(request)
    for name, value in (getattr(request, "model_extra", None) or {}).items():
        if name == XARGS and takes_xargs:
            continue
        if name in (STEER, *FLAT):
            raise InputError(f"the request has {name!r} outside {XARGS!r}; expected it inside")
        refuse_misspelled([name])
        for key in _keys_within([value]):
            refuse_misspelled([key])
            if key in (STEER, *FLAT):
                raise InputError(
                    f"the request has {key!r} in {name!r}; expected it in {XARGS!r}, of chats and "
                    "completions alone"
                )
    extra = getattr(request, XARGS, None) or {}
    if not getattr(request, "use_beam_search", False):
        return
    refuse_misspelled(extra)
    if default is not None and default.span.positions != "all":
        raise InputError(
            "a beam search is not steered by a default program with positions: to vLLM each of its "
            "steps is a prompt"
        )
    if {STEER, *FLAT} & set(extra):
        raise InputError(
            f"a beam search takes no {STEER!r}: vLLM gives no extra arguments to its steps; only "
            "the engine's default program steers it"
        )


def resolve_model(request: Any, models: Iterable[str], programs: Iterable[str]) -> None:
    """Take the program from the name of a model, and leave the name of the model alone.

    Parameters
    ----------
    request
        A request as vLLM's server has parsed it. One that takes no ``vllm_xargs`` cannot be
        steered: it is left as it is, and vLLM does not know the model.
    models
        The names of the models and adapters that are served.
    programs
        The programs by name.

    Raises
    ------
    InputError
        If there is no such program, or the request names another one as well.
    """
    given, served = request.model, set(models)
    if not given or given in served or not _takes_xargs(request):
        return
    model = max((m for m in served if given.startswith(f"{m}:")), key=len, default=None)
    if model is None:
        return
    program = given[len(model) + 1 :]
    there = [*programs, NONE]
    if program not in there:
        raise InputError(
            f"model {model!r} has no program {program!r}; there are: {', '.join(there)}"
        )
    extra = getattr(request, XARGS, None) or {}
    if extra.get(STEER, program) != program:
        raise InputError(
            f"the model names program {program!r}, and {STEER!r} names {extra[STEER]!r}; name one"
        )
    request.model = model
    setattr(request, XARGS, {**extra, STEER: program})


def list_programs(cards: list[Any], programs: Mapping[str, Any], default: str | None) -> None:
    """Add a card for each program to the cards of a server's models."""
    names = [*programs, *([] if default is None else [NONE])]
    cards += [
        card.model_copy(update={"id": f"{card.id}:{name}", "parent": card.id})
        for card in list(cards)
        for name in names
    ]


def _keys_within(value: Any) -> Iterator[str]:
    """Give the keys of the objects inside a field that vLLM does not know."""
    if isinstance(value, dict):
        yield from map(str, value)
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _keys_within(inner)


def _takes_xargs(request: Any) -> bool:
    """Whether vLLM hands a request's ``vllm_xargs`` on; a batch of chats hands on every field."""
    fields = getattr(type(request), "model_fields", ())
    return XARGS in fields or hasattr(request, "to_chat_completion_request")
