"""The commands of `refusal-kernels`, by what they are about; `cli.py` puts them together."""
