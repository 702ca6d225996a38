"""The public names. `__init__.py` reads this list and loads each name when it is first used."""

from refusal_kernels import ops as ops
from refusal_kernels.direction import Candidates as Candidates
from refusal_kernels.direction import Direction as Direction
from refusal_kernels.direction import Means as Means
from refusal_kernels.errors import InputError as InputError
from refusal_kernels.files.control_vector import ControlVector as ControlVector
from refusal_kernels.hf.chat import ChatFormat as ChatFormat
from refusal_kernels.hf.generate import generate as generate
from refusal_kernels.hf.load import load as load
from refusal_kernels.interventions import Ablate as Ablate
from refusal_kernels.interventions import Ace as Ace
from refusal_kernels.interventions import Add as Add
from refusal_kernels.interventions import Clamp as Clamp
from refusal_kernels.interventions import Erase as Erase
from refusal_kernels.interventions import Intervention as Intervention
from refusal_kernels.interventions import Rotate as Rotate
from refusal_kernels.interventions import Set as Set
from refusal_kernels.ops import explain as explain
from refusal_kernels.ops import use_backend as use_backend
from refusal_kernels.patching.families import Family as Family
from refusal_kernels.patching.families import register_family as register_family
from refusal_kernels.patching.handle import PatchHandle as PatchHandle
from refusal_kernels.patching.handle import unpatch as unpatch
from refusal_kernels.patching.patch import patch as patch
from refusal_kernels.research.evaluation.evidence import Evidence as Evidence
from refusal_kernels.research.evaluation.evidence import evaluate as evaluate
from refusal_kernels.research.evaluation.outcomes import Outcome as Outcome
from refusal_kernels.research.evaluation.outcomes import measure_outcomes as measure_outcomes
from refusal_kernels.research.extraction.collect import collect as collect
from refusal_kernels.research.extraction.collect import mean_difference as mean_difference
from refusal_kernels.research.extraction.methods import find_candidates as find_candidates
from refusal_kernels.research.extraction.moments import Moments as Moments
from refusal_kernels.research.selection.algorithm import Selection as Selection
from refusal_kernels.research.selection.algorithm import select as select
from refusal_kernels.research.sources import read_prompts as read_prompts
from refusal_kernels.vllm.engine import Engine as Engine
from refusal_kernels.weights.certificate import Certificate as Certificate
from refusal_kernels.weights.certificate import certify as certify
from refusal_kernels.weights.checkpoint import orthogonalize_checkpoint as orthogonalize_checkpoint
from refusal_kernels.weights.in_memory import orthogonalize as orthogonalize
from refusal_kernels.weights.lora import orthogonalize_lora as orthogonalize_lora

__version__: str
