"""Write a direction out of the weights: of a model in memory, of a checkpoint, or as an adapter."""
