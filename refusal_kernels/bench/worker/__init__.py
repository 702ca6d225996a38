"""Check and time methods on one model, told line by line; run by path, in any environment.

A peer has its own environment, without this package: so this folder needs torch, transformers and
safetensors alone, and imports nothing outside itself. Every worker times its own unmodified model
with its methods, so that a ratio never compares two versions of anything.

A worker reads one JSON object a line from its standard input and answers each with one:

    {"do": "open", "cell": {...}, "methods": {name: [file, variant]}, ...}   -> what each method is
    {"do": "round", "number": 0}                                             -> seconds a step
    {"do": "close"}

A method is a file with a docstring, whose first line says what it does, and

    @contextmanager
    def steer(model, task):       # the task: see `SteeringTask`
        ...                       # change this copy of the model
        yield model               # what is called like the model, and gives its logits
        ...                       # undo, where it reaches further than the copy

It may also give ``SITES``, where in a block it edits ("input", "attn", "mlp", "output"; without it
the first three), and ``during(task)``, a context in which it is run. What it cannot do it says by
``raise NotImplementedError("why")``.
"""

BASE = "unmodified"
SITES = ("input", "attn", "mlp")
EVERY_SITE = {*SITES, "output"}
FAR = 1e9  # JSON has no infinity
MOST = 16  # steps in one measurement, and room for them in the cache
