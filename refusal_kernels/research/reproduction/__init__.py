"""Run the paper's protocol on a model, and set every number beside a recorded row."""
