"""What is known of transformers: where things are in a model, how it is loaded, asked and run."""
