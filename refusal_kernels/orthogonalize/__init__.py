"""Write a direction out of the weights: of a model in memory, of a checkpoint, or as an adapter."""

from refusal_kernels.orthogonalize.adapter import Adapter, orthogonalize_lora
from refusal_kernels.orthogonalize.certificate import Certificate, certify, certify_checkpoint
from refusal_kernels.orthogonalize.checkpoint import (
    OrthogonalizedCheckpoint,
    orthogonalize_checkpoint,
)
from refusal_kernels.orthogonalize.weights import Orthogonalized, orthogonalize

__all__ = [
    "Adapter",
    "Certificate",
    "Orthogonalized",
    "OrthogonalizedCheckpoint",
    "certify",
    "certify_checkpoint",
    "orthogonalize",
    "orthogonalize_checkpoint",
    "orthogonalize_lora",
]
