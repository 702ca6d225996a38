"""The results of a protocol's steps, kept in a folder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refusal_kernels import __version__
from refusal_kernels.errors import InputError
from refusal_kernels.files.atomic import read_json, write_json

LAYOUT = 3  # of the results: those of another layout are computed again


class StepCache:
    """Runs a step only if no result is kept for the same inputs.

    `depends` is what every step depends on, ready for JSON. `part` is where the running step may
    keep an unfinished state, and `reused` lists the steps whose results were kept.
    """

    def __init__(self, folder: Path, *depends: Any) -> None:
        self.folder, self.reused = folder, list[str]()
        folder.mkdir(exist_ok=True)
        self.part = folder / "none.part"
        self.key = _digest([__version__, LAYOUT, *depends])

    def step(
        self,
        name: str,
        make: Callable[[], dict[str, Any]],
        *depends: Any,
        choices: Any = None,
        aside: bool = False,
    ) -> dict[str, Any]:
        """Return the kept result of a step, or run the step and keep its result.

        The result is kept under a digest of all that the step depends on and of the steps before
        it, except those with ``aside``. The result depends on `choices` too, the unfinished state
        does not: it stays if the result names a "problem", for another choice.
        """
        before = _digest([self.key, name, *depends])
        key = _digest([before, choices])
        if not aside:
            self.key = key
        path = self.folder / f"{name}.json"
        try:
            kept = read_json(path) if path.is_file() else None
        except InputError:  # damaged: computed again
            kept = None
        if isinstance(kept, dict) and kept.get("key") == key:
            self.reused.append(name)
            result: dict[str, Any] = kept["result"]
            return result
        self.part = self.folder / f"{name}-{before[:16]}.part"
        result = make()
        write_json(path, {"key": key, "result": result})
        if not result.get("problem"):
            self.part.unlink(missing_ok=True)
        return result


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
