"""What an intervention does to a model: refusals, abilities, and how sure that is."""
