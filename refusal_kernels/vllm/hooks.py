"""Run code before or after methods of vLLM: tables of hooks, and how they are put in place."""

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from refusal_kernels.errors import InputError

VERSIONS = ("0.32", "0.33")  # the first runs the tests; the other has the same signatures
BEFORE, AFTER = "before", "after"
MARK = "__refusal_kernels__"


class Hook(NamedTuple):
    """One method of vLLM, and what runs with it.

    Attributes
    ----------
    owner
        "module:Class", or "module" where `method` is a function.
    method
        Its name.
    when
        `BEFORE`: ``action(self, *args)`` runs first, and may raise. `AFTER`: it runs last, as
        ``action(self, *args, result=result)``; of a coroutine, when it has been awaited.
    action
        What runs.
    why
        What steering needs it for: "to route the tokens of each batch".
    """

    owner: str
    method: str
    when: str
    action: Callable[..., Any]
    why: str


def install(hooks: Sequence[Hook], instance: Any = None) -> None:
    """Put hooks in place; those that are there already stay.

    Parameters
    ----------
    hooks
        A table.
    instance
        An object of the class that the table names: it alone gets the hooks.

    Raises
    ------
    InputError
        If a method is missing; no hook is put in place then.
    """
    owners = [_owner(hook) if instance is None else instance for hook in hooks]
    missing = [
        f"{hook.owner.rpartition(':')[2]}.{hook.method} ({hook.why})"
        for hook, owner in zip(hooks, owners, strict=True)
        if owner is None or not hasattr(owner, hook.method)
    ]
    if missing:
        installed = getattr(sys.modules.get("vllm"), "__version__", "of an unknown version")
        raise InputError(
            f"vLLM {installed} has no {', no '.join(missing)}; "
            f"this plugin is written for vLLM {' and '.join(VERSIONS)}"
        )
    for hook, owner in zip(hooks, owners, strict=True):
        method = getattr(owner, hook.method)
        if not hasattr(method, MARK):
            bound = not isinstance(owner, type | ModuleType)
            action = functools.partial(hook.action, owner) if bound else hook.action
            setattr(owner, hook.method, _hooked(method, hook.when, action))


def _owner(hook: Hook) -> Any:
    """Return a class or a module; None if vLLM has none of that name."""
    try:
        return pkgutil.resolve_name(hook.owner)
    except (ImportError, AttributeError):
        return None


def _hooked(method: Callable[..., Any], when: str, action: Callable[..., Any]) -> Any:
    @functools.wraps(method)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        if when == BEFORE:
            action(*args, **kwargs)
            return method(*args, **kwargs)
        result = method(*args, **kwargs)
        if inspect.iscoroutine(result):
            return _awaited(result, functools.partial(action, *args, **kwargs))
        action(*args, result=result, **kwargs)
        return result

    setattr(hooked, MARK, True)
    return hooked


async def _awaited(coroutine: Coroutine[Any, Any, Any], action: Callable[..., Any]) -> Any:
    result = await coroutine
    action(result=result)
    return result
