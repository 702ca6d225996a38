"""Write a direction out of the weights: of a model in memory, of a checkpoint, or as an adapter."""

from refusal_kernels.orthogonalize.certificate import Certificate, certify
from refusal_kernels.orthogonalize.checkpoint import (
    OrthogonalizedCheckpoint,
    orthogonalize_checkpoint,
)
from refusal_kernels.orthogonalize.weights import Orthogonalized, orthogonalize

__all__ = [
    "Certificate",
    "Orthogonalized",
    "OrthogonalizedCheckpoint",
    "certify",
    "orthogonalize",
    "orthogonalize_checkpoint",
]
