"""Prompts of several turns."""

from collections.abc import Mapping, Sequence
from typing import Any

from refusal_kernels.errors import InputError

# the names that other formats give the roles of the chat templates
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


class Conversation(str):
    """A prompt of several turns; as a string it shows them.

    Everything that takes a prompt takes one, and the chat template gets its `messages`.
    """

    messages: tuple[dict[str, str], ...]

    def __new__(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        """Join the turns, each {"role": ..., "content": ...}, the last of them the user's."""
        shown = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)
        made = super().__new__(cls, shown)
        made.messages = tuple(dict(turn) for turn in messages)
        return made


def read_turns(records: Sequence[Any]) -> str:
    """Return the prompt that a list of messages asks: plain text if it is one turn of the user.

    A message has "role" and "content", or "from" and "value". Answers after the user's last turn
    are left out.

    Raises
    ------
    InputError
        If a message is none, or no turn is the user's.
    """
    turns = [_turn(record) for record in records]
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns:
        raise InputError("a list of messages without a turn of the user; expected one or more")
    return turns[0]["content"] if len(turns) == 1 else Conversation(turns)


def _turn(record: Any) -> dict[str, str]:
    fields = record if isinstance(record, Mapping) else {}
    role, content = fields.get("role", fields.get("from")), fields.get("content")
    content = fields.get("value") if content is None else content
    if isinstance(content, list):  # parts, of which a prompt has texts alone
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = None if None in parts else "\n".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            "a list of messages of another form; expected an object with role and content each"
        )
    return {"role": ROLES.get(role.lower(), role.lower()), "content": content}
