"""The names by which the parts of the plugin, in several processes, know each other."""

KEY = "refusal_kernels"  # of the plugin's settings in additional_config
GRAPH = "graph"  # in those settings: what the compiled graph depends on, written by the worker
VERSIONS = "versions"  # in those settings: of the programs, as the front end has read them
# In a request's extra_args: a name or an object, and what is flat beside a name.
STEER, STRENGTH = "steer", "steer_strength"
FLAT = {STRENGTH: "strength", **{f"steer_{key}": key for key in ("positions", "from", "to")}}
RESOLVED = "refusal_kernels.steer"  # the same, as the front end hands it to the workers
READ = "refusal_kernels.read"  # in a request's extra_args: what is read of it, and its number
READINGS = MOMENTS, PROJECTION, LOGITS, SCORES = "moments", "projection", "logits", "scores"
GROUPS = 2  # of prompts, whose moments are kept apart
# Attributes that vLLM's objects are given.
CATALOG, STATE = "refusal_kernels", "refusal_kernels_state"
SETTINGS = "refusal_kernels_settings"
# Methods that every worker is given.
UPDATE, MONITOR = "refusal_kernels_update", "refusal_kernels_monitor"
READING = "refusal_kernels_reading"
