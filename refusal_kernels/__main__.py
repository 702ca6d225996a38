"""`python -m refusal_kernels`, and so `torchrun -m refusal_kernels`."""

from refusal_kernels.cli import main

if __name__ == "__main__":
    main()
