"""What is installed, and whether it works."""

from contextlib import suppress

from rich.table import Table
from rich.text import Text

from refusal_kernels.cli import options
from refusal_kernels.cli.bars import progress_bars
from refusal_kernels.cli.common import console, finish
from refusal_kernels.cli.groups import LoadingOptions
from refusal_kernels.progress import single_step


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
    from refusal_kernels.hf.load import read_config
    from refusal_kernels.hf.memory import block_devices, free_bytes, held_bytes, needed_bytes
    from refusal_kernels.hf.model import hidden_size, input_device
    from refusal_kernels.interventions import Ablate
    from refusal_kernels.patching.patch import patch

    facts = {**versions(), "cuda device": str(torch.cuda.is_available())}
    for kind in ("cpu", "cuda"):
        for precision in (torch.float32, torch.bfloat16, torch.float64):
            key = f"{kind} {str(precision).removeprefix('torch.')}"
            facts[key] = str(ops.explain(device=kind, dtype=precision))
    facts["free memory"] = _sizes(free_bytes())
    # before the load, which may need more than there is
    console.print(f"free memory: {facts['free memory']}", soft_wrap=True)
    if (config := read_config(loading.model, loading.how())) is not None:
        with suppress(Exception):  # a model of no known kind: the load says so
            needed = needed_bytes(config, loading.trust_remote_code)
            facts["weights, loaded in"] = _sizes(needed)
            text = f"{loading.model}: weights loaded in {facts['weights, loaded in']}"
            console.print(Text(text), soft_wrap=True)
    with progress_bars() as step, single_step(step("Load the model")):
        model, _ = loading.load()
    direction = Direction(torch.ones(hidden_size(model)))
    with patch(model, Ablate(direction)) as handle:
        facts[f"patch of {loading.model}"] = str(handle.report())
        details = handle.report().details
    facts["device"] = describe_device(input_device(model))
    facts["weights"] = _sizes(held_bytes(model))
    facts.setdefault("weights, loaded in", _sizes(needed_bytes(model.config, True)))
    facts["blocks"] = "; ".join(
        f"{_ranges(blocks)} on {place}" if place != "offloaded" else f"{_ranges(blocks)} {place}"
        for place, blocks in block_devices(model).items()
    )
    table = Table("what", "found", title="refusal-kernels doctor")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    if verbose:
        console.print(Text(details), soft_wrap=True)
    finish(None, json_file, facts)


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in sizes.items())


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ranges: 0 to 3, 8."""
    ends = [i for i, n in enumerate(numbers) if n + 1 not in numbers[i + 1 : i + 2]]
    starts = [0, *(end + 1 for end in ends[:-1])]
    spans = [(numbers[a], numbers[b]) for a, b in zip(starts, ends, strict=True)]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in spans)
