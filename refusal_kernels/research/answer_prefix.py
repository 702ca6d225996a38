"""What every answer of a model begins with, such as the opening of a thought.

The refusal score looks at the first token of an answer, and a model that always begins alike says
nothing there. With a prefix the answer is read, and the directions too, after what is common.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.generate import generate_ids

PROMPTS, TOKENS = 8, 16  # of each set, and of each answer, that are looked at
# what ends a thought that an answer opens, so that the next token is the answer's own
THOUGHTS = {
    "<think>": "<think>\n\n</think>\n\n",
    "<thought>": "<thought>\n\n</thought>\n\n",
    "<seed:think>": "<seed:think></seed:think>",
    "[THINK]": "[THINK][/THINK]",
    "<|START_THINKING|>": "<|START_THINKING|><|END_THINKING|>",
    "<|channel>thought": "<|channel>thought\n<channel|>",
    "\u25c1think\u25b7": "\u25c1think\u25b7\u25c1/think\u25b7",
    "<reasoning>": "<reasoning>\n\n</reasoning>\n\n",
    "<|begin_of_thought|>": "<|begin_of_thought|>\n\n<|end_of_thought|>\n\n",
    "<|channel|>analysis<|message|>": (
        "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
    ),
}


def find_answer_prefix(
    model: Any, chat: ChatFormat, prompts: Mapping[str, Sequence[str]], batch_size: int = 64
) -> str:
    """Return the text with which the model begins its answers to all sets of prompts, or "".

    A prefix that opens a thought is replaced by an empty thought, unless the format asks for
    thinking.
    """
    asked = [prompt for part in prompts.values() for prompt in list(part)[:PROMPTS]]
    answers = generate_ids(model, chat, asked, TOKENS, batch_size)
    same = [len(set(column)) == 1 for column in zip(*answers, strict=False)]
    common = answers[0][: same.index(False) if False in same else len(same)]
    text = str(chat.tokenizer.decode(common))
    if not chat.thinking:
        for opening, empty in THOUGHTS.items():
            if text.startswith(opening):
                return empty
    return "" if len(common) == min(map(len, answers)) else text  # a whole answer is no prefix
