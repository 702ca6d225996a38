"""What a run is told: grid, methods, machine, and the command that gives a row again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal_kernels.bench.catalog import Method
from refusal_kernels.bench.grid import ALL, Cell, Grid
from refusal_kernels.environment import describe_device, versions
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json


@dataclass(frozen=True)
class Settings:
    """Everything that a run is told.

    Attributes
    ----------
    answer_s
        How long a worker may take for one answer.
    """

    profile: str
    grid: Grid
    methods: tuple[Method, ...]
    device: str
    threads: int
    out: Path
    answer_s: float = 240.0

    def comparable(self) -> dict[str, Any]:
        """What must be the same for a measured cell to be kept."""
        return {
            "threads": self.threads,
            "measure_s": self.grid.measure_s,
            "versions": versions(),
            "device": describe_device(self.device),
        }

    @property
    def path(self) -> Path:
        """What is written, without its suffix."""
        return self.out / f"overhead-{self.device.split(':')[0]}"

    def command(self, cell: Cell, method: str) -> str:
        """Return the command that gives one row."""
        words = {
            "--models": cell.model, "--layers": cell.layers, "--phases": cell.work,
            "--batch": cell.batch, "--dtypes": cell.dtype, "--modes": cell.mode,
            "--steered-layers": ALL if cell.steered is None else cell.steered,
            "--programs": cell.programs, "--methods": "", "--rounds": self.grid.rounds,
            "--device": self.device, "--threads": self.threads,
        }  # fmt: skip
        words["--methods"] = next(m.given for m in self.methods if m.name == method)
        given = " ".join(f"{option} {value}" for option, value in words.items())
        return f"refusal-kernels bench --profile {self.profile} {given}"


def earlier_rows(path: Path, comparable: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the run that was written to a path; none where nothing is there.

    Raises
    ------
    InputError
        If it was measured otherwise: its rows would be written over.
    """
    path = path.with_suffix(".json")
    if not path.is_file():
        return []
    document = read_json(path)
    earlier = document.get("settings") if isinstance(document, dict) else None
    if not isinstance(earlier, dict):
        raise InputError(f"--resume: {path} is no result of refusal-kernels bench")
    was, now = _flat(earlier), _flat(comparable)
    for name in (name for name in was | now if was.get(name) != now.get(name)):
        raise InputError(
            f"--resume: {path} was measured with {name} {was.get(name)}; expected "
            f"{now.get(name)}, as now. Leave --resume out to begin anew, or give another --out"
        )
    return document["rows"]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """What must be the same, each with a name of its own."""
    versions = settings.get("versions")
    rest = {name: value for name, value in settings.items() if name != "versions"}
    return {**rest, **versions} if isinstance(versions, dict) else settings
