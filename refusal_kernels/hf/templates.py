"""Chat templates that others wrote: what they raise, and the date that some of them write."""

import contextlib
import datetime
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from jinja2 import TemplateError

from refusal_kernels.errors import InputError, first_line

DATE = "2024-07-26"
"""The day that a template is told, unless another is given: that of Llama 3.1's own template."""
_LOCK = threading.Lock()


def own_ids(tokenizer: Any) -> bool:
    """Whether a tokenizer has no template, but a way of its own from a chat to tokens.

    mistral-common's has.
    """
    if getattr(tokenizer, "chat_template", None):
        return False
    from transformers import PreTrainedTokenizerBase  # slow to import

    apply = getattr(type(tokenizer), "apply_chat_template", None)
    return apply is not None and apply is not PreTrainedTokenizerBase.apply_chat_template


def apply_template(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], date: str = DATE, **options: Any
) -> Any:
    """Show a chat as its tokenizer does, up to where the assistant begins.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer.
    messages
        The turns, each with "role" and "content".
    date
        What a template that asks for today's date is told, as "2024-07-26": a result must not
        depend on the day, and a run must be able to resume on the next.
    options
        Of the template, such as ``enable_thinking``.

    Returns
    -------
    str or list of int
        The text, or the tokens of a tokenizer without a template (`own_ids`).

    Raises
    ------
    InputError
        If it raises anything.
    """
    try:
        if own_ids(tokenizer):
            return tokenizer.apply_chat_template(
                messages, tokenize=True, add_generation_prompt=True, return_dict=False
            )
        dated = "strftime_now" in tokenizer.get_chat_template()
        with _clock(read_date(date)) if dated else contextlib.nullcontext():
            return tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **options
            )
    except TemplateError as error:  # in the template's own words
        raise InputError(f"the chat template refuses the conversation: {error}") from None
    except Exception as error:  # whatever its expressions can bring
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the chat template refuses the conversation: {reason}") from None


@contextlib.contextmanager
def _clock(day: datetime.date) -> Iterator[None]:
    """Let the function that transformers gives to templates, ``strftime_now``, say a day."""
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils
    time = datetime.datetime.combine(day, datetime.time())
    with _LOCK:
        real = module.datetime
        module.datetime = SimpleNamespace(now=lambda: time)
        try:
            yield
        finally:
            module.datetime = real


def read_date(date: str) -> datetime.date:
    """Read a date such as "2024-07-26"."""
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise InputError(f"the date is {date!r}; expected one such as '{DATE}'") from None
