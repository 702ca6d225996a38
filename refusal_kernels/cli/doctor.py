"""What is here: doctor."""

import torch
from rich.table import Table

from refusal_kernels import ops
from refusal_kernels.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    console,
    finish,
)
from refusal_kernels.direction import Direction
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.hf.load import load
from refusal_kernels.hf.model import hidden_size, input_device
from refusal_kernels.interventions import Ablate
from refusal_kernels.patching.patch import patch


def doctor(
    model: ModelOption = "toy",
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Say what is installed, which backend serves what, and whether a model can be patched."""
    table = Table("what", "found", title="refusal-kernels doctor")
    found = {**versions(), "cuda device": str(torch.cuda.is_available())}
    for kind in ("cpu", "cuda"):
        for precision in (torch.float32, torch.bfloat16, torch.float64):
            key = f"{kind} {str(precision).removeprefix('torch.')}"
            found[key] = str(ops.explain(device=kind, dtype=precision))
    language_model, _ = load(model, device, dtype)
    vector = torch.ones(hidden_size(language_model))
    with patch(language_model, Ablate(Direction(vector))) as handle:
        found[f"patch of {model}"] = str(handle.report()).splitlines()[0]
    found["device"] = describe_device(input_device(language_model))
    for name, value in found.items():
        table.add_row(name, value)
    console.print(table)
    finish(None, json_file, found)
