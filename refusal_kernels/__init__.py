"""Directional steering of a language model's residual stream, at the speed of the unmodified model.

>>> import refusal_kernels as rk
>>> direction = rk.Direction.load("refusal.safetensors")  # doctest: +SKIP
>>> with rk.patch(model, rk.Ablate(direction)):  # doctest: +SKIP
...     model.generate(**inputs)
"""

from importlib.metadata import version as _version

from refusal_kernels import ops
from refusal_kernels.control_vector import ControlVector
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.evaluation import evaluate, generate
from refusal_kernels.evidence import Evidence, gather_evidence
from refusal_kernels.extraction import ChatFormat, Moments, collect, mean_difference, read_prompts
from refusal_kernels.interventions import Ablate, Add, Clamp, Erase, Intervention, Set
from refusal_kernels.methods import find_candidates
from refusal_kernels.ops import explain, use_backend
from refusal_kernels.orthogonalize import (
    Certificate,
    certify,
    orthogonalize,
    orthogonalize_checkpoint,
    orthogonalize_lora,
)
from refusal_kernels.patching import PatchHandle, patch
from refusal_kernels.selection import Selection, select

__version__ = _version("refusal-kernels")

__all__ = [
    "Ablate",
    "Add",
    "Certificate",
    "ChatFormat",
    "Clamp",
    "ControlVector",
    "Direction",
    "Erase",
    "Evidence",
    "InputError",
    "Intervention",
    "Moments",
    "PatchHandle",
    "Selection",
    "Set",
    "certify",
    "collect",
    "evaluate",
    "explain",
    "find_candidates",
    "gather_evidence",
    "generate",
    "mean_difference",
    "ops",
    "orthogonalize",
    "orthogonalize_checkpoint",
    "orthogonalize_lora",
    "patch",
    "read_prompts",
    "select",
    "use_backend",
]
