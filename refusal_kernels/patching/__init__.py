"""Patching Hugging Face models: the residual adds of the decoder layers become steered adds."""

from refusal_kernels.patching.handle import PatchHandle, PatchReport, unpatch
from refusal_kernels.patching.patch import patch

__all__ = ["PatchHandle", "PatchReport", "patch", "unpatch"]
