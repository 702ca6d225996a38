"""Chat templates that others wrote: what they raise, and the date that some of them write."""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from refusal_kernels.errors import InputError, first_line

DATE = "2024-07-26"
"""The day that a template is told, unless another is given: that of Llama 3.1's own template."""

_TODAY = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


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
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            options["chat_template"] = _dated(template, date)
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **options
        )
    except TemplateError as error:  # in the template's own words
        raise InputError(f"the chat template refuses the conversation: {error}") from None
    except Exception as error:  # whatever its expressions can bring
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the chat template refuses the conversation: {reason}") from None


def _dated(template: str, date: str) -> str:
    """Write a date into a template where it asks for today's."""
    day = read_date(date)
    return _TODAY.sub(lambda call: repr(day.strftime(call[1] or call[2] or "")), template)


def read_date(date: str) -> datetime.date:
    """Read a date such as "2024-07-26"."""
    try:
        return datetime.date.fromisoformat(date)
    except (TypeError, ValueError):
        raise InputError(f"the date is {date!r}; expected one such as '{DATE}'") from None
