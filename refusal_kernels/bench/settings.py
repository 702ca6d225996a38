"""The settings of a run, and the command that measures a row again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal_kernels.bench.catalog import BenchMethod
from refusal_kernels.bench.grid import ALL, Grid
from refusal_kernels.bench.results import read_results
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError


@dataclass(frozen=True)
class BenchSettings:
    """Grid, methods, device and limits of a run."""

    profile: str
    grid: Grid
    methods: tuple[BenchMethod, ...]
    device: str
    threads: int
    out: Path
    answer_s: float = 240.0  # how long a worker may take for one answer

    def comparable(self) -> dict[str, Any]:
        """What must be the same for a measured cell to be kept."""
        return {
            "torch_threads": self.threads,
            "measure_s": self.grid.measure_s,
            "versions": versions(),
            "device": describe_device(self.device),
        }

    @property
    def path(self) -> Path:
        """What is written, without its suffix."""
        kind = "models" if self.profile == "models" else "overhead"
        return self.out / f"{kind}-{self.device.split(':')[0]}"


def command_for(document: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the command that measures one row of a document again."""
    words = {
        "--models": row["model"], "--layers": row["layers"], "--phases": row["work"],
        "--batch": row["batch"], "--dtypes": row["dtype"], "--modes": row["mode"],
        "--steered-layers": ALL if row["steered"] is None else row["steered"],
        "--programs": row["programs"], "--methods": document["methods"][row["method"]][0],
        "--rounds": document["rounds"], "--device": document["device_kind"],
        "--threads": document["torch_threads"],
    }  # fmt: skip
    given = " ".join(f"{option} {value}" for option, value in words.items())
    return f"refusal-kernels bench --profile {document['profile']} {given}"


def earlier_rows(path: Path, comparable: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the run that was written to a path; none where nothing is there.

    One that was measured otherwise is refused: its rows would be written over.
    """
    path = path.with_suffix(".jsonl")
    if not path.is_file():
        return []
    document = read_results(path)
    now = {**comparable, **comparable["versions"]}  # each version by the name of its package
    was = {**{name: document.get(name) for name in comparable}, **document["versions"]}
    differ = [name for name in was | now if was.get(name) != now.get(name)]
    for name in (name for name in differ if name != "versions"):
        raise InputError(
            f"--resume: {path} was measured with {name} {was.get(name)}; expected "
            f"{now.get(name)}, as now. Leave --resume out to begin anew, or give another --out"
        )
    return document["rows"]
