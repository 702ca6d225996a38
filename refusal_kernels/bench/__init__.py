"""The cost of steering: every method beside the unmodified model, in the same minutes."""
