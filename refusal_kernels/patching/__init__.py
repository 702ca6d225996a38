"""Patching Hugging Face models: the residual adds of the decoder layers become steered adds."""
