"""Methods of a test: right, wrong, slow, and failing ones."""

HALF = '''"""Takes half of it out."""
from contextlib import contextmanager
@contextmanager
def steer(model, task):
    r = task.per_row(model.dtype)
    def half(module, args):
        return (args[0] - 0.5 * (args[0] * r).sum(-1, keepdim=True) * r, *args[1:])
    for block in model.model.layers:
        block.register_forward_pre_hook(half)
    yield model
'''

RAISES = '''"""Fails."""
def steer(model, task):
    raise ValueError("not today")
'''

SLEEPS = '''"""Takes its time."""
import time
from contextlib import contextmanager
@contextmanager
def steer(model, task):
    model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.2))
    yield model
'''

DIES = '''"""Ends the process."""
import os
def steer(model, task):
    os._exit(7)
'''

DIES_OF_FLOAT32 = HALF.replace(
    "    r =", "    if str(model.dtype) == 'torch.float32': __import__('os')._exit(7)\n    r ="
)

SLOW = SLEEPS.replace("0.2", "2")


def by_method(document):
    return {row["method"]: row for row in document["rows"]}


def script(folder, text):
    """Write what stands in for an interpreter."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
