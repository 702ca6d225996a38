"""What needs nothing beside this package: one file a method (`refusal_kernels.bench.worker`)."""
