"""Directional steering of a language model's residual stream, at the speed of the unmodified model.

>>> import refusal_kernels as rk
>>> direction = rk.Direction.load("refusal.safetensors")  # doctest: +SKIP
>>> with rk.patch(model, rk.Ablate(direction)):  # doctest: +SKIP
...     model.generate(**inputs)
"""

from importlib.metadata import version as _version

from refusal_kernels import ops
from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.files.control_vector import ControlVector
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.interventions import Ablate, Add, Clamp, Erase, Intervention, Set
from refusal_kernels.ops import explain, use_backend
from refusal_kernels.patching.handle import PatchHandle
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.evaluation.evidence import Evidence, gather_evidence
from refusal_kernels.research.evaluation.outcomes import evaluate, generate
from refusal_kernels.research.extraction.collect import collect, mean_difference
from refusal_kernels.research.extraction.methods import find_candidates
from refusal_kernels.research.extraction.moments import Moments
from refusal_kernels.research.selection.algorithm import Selection, select
from refusal_kernels.research.sources import read_prompts
from refusal_kernels.weights.adapter import orthogonalize_lora
from refusal_kernels.weights.certificate import Certificate, certify
from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint
from refusal_kernels.weights.weights import orthogonalize

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
