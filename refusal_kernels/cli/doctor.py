"""What is installed, and whether it works."""

from rich.table import Table
from rich.text import Text

from refusal_kernels.cli import options
from refusal_kernels.cli.common import console, finish
from refusal_kernels.cli.groups import LoadingOptions


def doctor(
    *,
    loading: LoadingOptions,
    verbose: options.Verbose = False,
    json_file: options.Json = None,
) -> None:
    """Say what is installed, which backend serves what, and whether a model can be patched."""
    import torch

    from refusal_kernels import ops
    from refusal_kernels.direction import Direction
    from refusal_kernels.environment import describe_device, versions
    from refusal_kernels.hf.model import hidden_size, input_device
    from refusal_kernels.interventions import Ablate
    from refusal_kernels.patching.patch import patch

    facts = {**versions(), "cuda device": str(torch.cuda.is_available())}
    for kind in ("cpu", "cuda"):
        for precision in (torch.float32, torch.bfloat16, torch.float64):
            key = f"{kind} {str(precision).removeprefix('torch.')}"
            facts[key] = str(ops.explain(device=kind, dtype=precision))
    model, _ = loading.load()
    direction = Direction(torch.ones(hidden_size(model)))
    with patch(model, Ablate(direction)) as handle:
        facts[f"patch of {loading.model}"] = str(handle.report())
        details = handle.report().details
    facts["device"] = describe_device(input_device(model))
    table = Table("what", "found", title="refusal-kernels doctor")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    if verbose:
        console.print(Text(details), soft_wrap=True)
    finish(None, json_file, facts)
