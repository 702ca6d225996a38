"""repeng: a control at the output of every block, with an operator that projects.

`ControlModel` wraps whole blocks, so the stream can be edited after a block and nowhere else: what
the first block reads, and what a block's MLP reads of its attention, keeps the direction.
"""

from contextlib import contextmanager

import torch
from repeng import ControlModel

SITES = ("output",)


def project(current, control):
    return current - (current * control).sum(-1, keepdim=True) * control


@contextmanager
def steer(model, task):
    blocks = task.blocks(model.config.num_hidden_layers)
    controlled = ControlModel(model, blocks)
    r = task.per_row(model.dtype)
    controlled.set_raw_control(dict.fromkeys(blocks, r), operator=project)

    def call(**fed):  # as generate() calls it: its padding mask needs the position of every row
        cache = fed.get("past_key_values", fed.get("cache"))
        before = cache.get_seq_length() if cache is not None else 0
        batch, tokens = fed["input_ids"].shape
        places = torch.arange(before, before + tokens, device=fed["input_ids"].device)
        return controlled(**fed, position_ids=places.expand(batch, -1))

    yield call
