"""Methods by name: those of this package, the peers, and any file."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from refusal_kernels.bench.worker import BASE
from refusal_kernels.errors import InputError
from refusal_kernels.ops.registry import BACKENDS

HERE = "this environment"
PACKAGE = "refusal_kernels"
METHODS = Path(__file__).parent / "methods"
CHECKOUT = Path(__file__).parents[2]
PEERS = CHECKOUT / "benchmarks" / "peers"
ENVIRONMENTS = CHECKOUT / ".venv-peers"
TOO_SLOW = ("triton", "cpu")  # the interpreter: it takes minutes for a step of a model
PLUGIN = "vllm:plugin"
ENGINES = (PLUGIN, "vllm:hooks")
OWN = tuple(sorted(path.stem for path in METHODS.glob("[a-z]*.py")))  # of this repository
ENGINE_ENVIRONMENT = CHECKOUT / ".venv-vllm"
BEFOREHAND = ("orthogonalized",)  # edits that are made before the model runs


@dataclass(frozen=True)
class BenchMethod:
    """A method's file, and what runs it."""

    name: str
    file: Path
    variant: str | None
    given: str  # what --methods was given for it
    environment: str  # all methods of one share a process and its unmodified model
    python: Path
    missing: str | None = None  # why it cannot be run here
    engine: bool = False  # not a model


def find(names: Sequence[str] | None, device: str, peers: Path = PEERS) -> list[BenchMethod]:
    """Return the methods of these names; by default this package's and the peers'.

    A name is a method of this package (with ``:variant``), "own" for all of them, a peer, "peers"
    for all, "engines" for those of vLLM, or the path of a file, which ``@PYTHON`` gives another
    interpreter. The device chooses the backends that "refusal_kernels" stands for.
    """
    here = [name for name in OWN if name not in (BASE, PACKAGE)]
    kind = torch.device(device).type
    served = [
        f"{PACKAGE}:{name}"
        for name, backend in BACKENDS.items()
        if (name, kind) != TOO_SLOW and backend.why_not(kind, torch.bfloat16) is None
    ]
    groups = {
        "own": [*served, *here],
        "peers": sorted(path.stem for path in peers.glob("[a-z]*.py")),
        "engines": ENGINES,
        PACKAGE: served,
    }
    wanted: list[str] = [BASE]
    for name in names if names is not None else ("own", "peers"):
        wanted += groups.get(name, [name])
    methods = [_one(name, peers) for name in dict.fromkeys(wanted)]
    for method, count in Counter(method.name for method in methods).items():
        if count > 1:  # results are kept by name
            raise InputError(f"--methods: {count} methods are called '{method}'; rename a file")
    return methods


def _one(name: str, peers: Path) -> BenchMethod:
    """Find one method's file and its interpreter."""
    text, at, python = name.partition("@")
    if text.endswith(".py"):
        file = Path(text)
        if not file.is_file():
            raise InputError(f"--methods: there is no file {file}")
        runs = Path(python).absolute() if at else Path(sys.executable)
        # an environment for this file alone, so that its failure does not end other methods
        return BenchMethod(file.stem, file.absolute(), None, name, file.stem, runs)
    stem, _, variant = name.partition(":")
    if (METHODS / f"{stem}.py").is_file() and not stem.startswith("_"):
        file = METHODS / f"{stem}.py"
        return BenchMethod(name, file, variant or None, name, HERE, Path(sys.executable))
    if name in ENGINES:
        file, environment, folder = Path(), "vllm", ENGINE_ENVIRONMENT
    elif (file := peers / f"{name}.py").is_file():
        environment, folder = name, ENVIRONMENTS / name
    else:
        known = [path.stem for folder in (METHODS, peers) for path in folder.glob("[a-z]*.py")]
        raise InputError(
            f"--methods: no method '{name}'; there are {', '.join(sorted(known))}, "
            "own, peers, engines, and any file FILE.py[@PYTHON]"
        )
    ready = (folder / ".ready").is_file()
    missing = None if ready else f"not installed: {folder.relative_to(CHECKOUT)} is not set up"
    runs = folder / "bin" / "python"
    return BenchMethod(name, file, None, name, environment, runs, missing, name in ENGINES)
