"""What is measured: the cells, and the profiles that choose them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from refusal_kernels.bench.shapes import layer_weights
from refusal_kernels.bench.worker import MOST
from refusal_kernels.errors import InputError

PHASES = ("decode", "prefill")
DTYPES = ("float32", "bfloat16", "float16")
MODES = {"cpu": ("eager", "compile"), "cuda": ("eager", "compile", "graph")}
CONTEXT = 128
"""Tokens before the one that is decoded, at most."""
ALL = "all"
AXES = {"dtype": "dtypes", "mode": "modes", "steered": "steered", "programs": "programs"}
"""Fields of `BenchCell` that can vary one at a time, with the fields of `Grid` for their values."""


@dataclass(frozen=True)
class BenchCell:
    """Model and work that every method is timed on."""

    model: str
    layers: int  # that it is measured with
    of_layers: int
    hidden: int
    dtype: str
    mode: str
    work: str
    batch: int
    tokens: int  # of each row: in the cache (decode) or given at once (prefill)
    steered: int | None = None  # blocks in the middle where the direction is removed; None: all
    programs: int = 1  # directions; row i of the batch takes direction i modulo that

    def __str__(self) -> str:
        layers = f"{self.layers} of {self.of_layers} layers"
        if self.layers == self.of_layers:
            layers = f"{self.layers} layers"
        text = f"{self.model}, {layers}, {self.dtype}, {self.mode}, {self.work} {self.batch}"
        text += f" x {self.tokens}"
        text += f", {self.steered} steered" if self.steered is not None else ""
        return text + (f", {self.programs} programs" if self.programs > 1 else "")

    @property
    def steered_blocks(self) -> list[int] | None:
        """The numbers of the steered blocks; None: all."""
        if self.steered is None:
            return None
        first = (self.layers - self.steered) // 2
        return list(range(first, first + self.steered))

    @property
    def rows(self) -> list[int]:
        """The program of every row."""
        return [row % self.programs for row in range(self.batch)]


@dataclass(frozen=True)
class Grid:
    """The values of every axis."""

    limit_s: float  # when no further cell is begun
    models: tuple[str, ...]
    layers: int | None  # of each model; None: what fits in memory
    phases: tuple[str, ...]
    batch: tuple[int, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    steered: tuple[int | None, ...] = (None,)  # None: all layers
    programs: tuple[int, ...] = (1,)
    rounds: int = 41  # the most
    measure_s: float = 0.1  # about how long one measurement takes; short, so that there are many
    # Fields of `AXES` whose further values are measured one at a time, in one cell of each model
    # that decodes: the largest batch for steered layers and programs, else the smallest. All other
    # fields are crossed.
    vary: tuple[str, ...] = ("steered", "programs")
    # The most weights in a layer of a model where they vary. In a larger model a round takes so
    # long that the noise hides what they change.
    vary_weights: float | None = None
    # The most layers of a model with random weights, and the most weights in them (one layer is
    # always kept). A ratio hardly depends on the number of layers.
    shape_layers: int | None = None
    shape_weights: float | None = None
    prompt: int = 512  # tokens of a prompt, or with `shared` of all rows together
    # The most multiplications by weights that a prompt, or the context of a decoded token, may
    # take. It is shortened to fit.
    prompt_work: float | None = None
    shared: bool = False

    def combinations(self, varied: bool = True) -> Iterator[dict[str, Any]]:
        """Give phase, batch, dtype, mode, steered and programs of every cell of one model.

        Without ``varied`` the fields of ``vary`` keep their first value.
        """
        usual = {axis: getattr(self, values)[0] for axis, values in AXES.items()}
        axes = product(
            self.dtypes, self.modes, self.phases, self.batch, self.steered, self.programs
        )
        names = ("dtype", "mode", "work", "batch", "steered", "programs")
        for values in axes:
            cell: dict[str, Any] = dict(zip(names, values, strict=True))
            if cell["programs"] > cell["batch"]:
                continue
            other = [axis for axis in self.vary if cell[axis] != usual[axis]]
            if not other:
                yield cell
                continue
            if not varied:
                continue
            batch = max(self.batch) if other[0] in ("steered", "programs") else min(self.batch)
            if cell == {**cell, **usual, other[0]: cell[other[0]]} and (
                (cell["work"], cell["batch"]) == (self.phases[0], batch)
            ):
                yield cell

    def most_layers(self, config: Any) -> int | None:
        """Return how many layers at most a model with random weights has; None: no limit."""
        most = [] if self.shape_layers is None else [self.shape_layers]
        if self.shape_weights is not None:
            most.append(max(1, int(self.shape_weights // layer_weights(config))))
        return min(most, default=None)

    def prompt_tokens(self, config: Any, layers: int, batch: int) -> int:
        """Return how many tokens each row's prompt has."""
        tokens = min(self.prompt, self._most_tokens(config, layers))
        return max(1, tokens // batch) if self.shared else tokens

    def context_tokens(self, config: Any, layers: int, batch: int) -> int:
        """Return how many tokens are before the one that each row decodes."""
        return max(1, min(CONTEXT, self._most_tokens(config, layers) // batch))

    def _most_tokens(self, config: Any, layers: int) -> int:
        if self.prompt_work is None:
            return 1 << 20
        most = max(1, int(self.prompt_work // (layers * layer_weights(config))))
        return 1 << (most.bit_length() - 1)  # a power of two, so that rows can share it

    def cells(self, name: str, layers: int, config: Any) -> list[BenchCell]:
        """Return the cells of one model that is measured with so many layers."""
        positions = getattr(config, "max_position_embeddings", None) or 1 << 20
        most = self.vary_weights
        varied = most is None or layer_weights(config) <= most
        cells = []
        for axes in self.combinations(varied):
            if (axes["steered"] or 0) > layers:
                continue
            room = positions - (MOST if axes["work"] == "decode" else 0)
            of = self.prompt_tokens if axes["work"] == "prefill" else self.context_tokens
            tokens = min(of(config, layers, axes["batch"]), room)
            size = config.num_hidden_layers, config.hidden_size
            cells.append(BenchCell(name, layers, *size, tokens=tokens, **axes))
        return cells


PROFILES = {
    "smoke": Grid(
        120, ("toy",), None, ("decode",), (2,), ("float32",), ("eager",), rounds=7, measure_s=0.005,
    ),
    "quick": Grid(
        780, ("toy", "qwen2.5-0.5b"), None, PHASES, (1, 8), ("bfloat16",), ("eager",),
        (None, 1), (1, 4), rounds=41,
    ),
    "models": Grid(
        1800, ("qwen2.5-0.5b", "llama-3.2-1b"), None, PHASES, (1, 8), ("float32", "bfloat16"),
        ("eager",), rounds=2001, measure_s=0.05,
    ),
    "full": Grid(
        7200, ("qwen2.5-72b", "llama-3-8b", "llama-3.2-1b", "qwen2.5-0.5b", "toy"), None,
        PHASES, (1, 8, 32), ("float32", "bfloat16"), ("eager", "compile"), (None, 1, 4), (1, 8),
        rounds=101,
    ),
}  # fmt: skip
# On a CPU, matrix products of 4,096 tokens hide everything else, so prompts are short. With all
# axes crossed the full profile would take more than a day. Its limit leaves room for preparing the
# last cell within two hours. The largest model comes first, since the cells that follow share the
# rest of the time, and small models need less of it.
ON_CPU: dict[str, dict[str, Any]] = {
    "quick": {"shape_layers": 4, "shared": True},
    "models": {"shape_layers": 6, "shared": True},
    "full": {
        "limit_s": 6300, "batch": (1, 8), "vary": tuple(AXES), "vary_weights": 5e7,
        "shape_layers": 6, "shape_weights": 5e8, "prompt_work": 1e11, "shared": True,
    },
}  # fmt: skip


def grid_for(profile: str, device: str, given: dict[str, Any]) -> Grid:
    """Return a profile's grid with the fields that were given in its place; None: not given."""
    if profile not in PROFILES:
        raise InputError(f"--profile is '{profile}'; expected one of {', '.join(PROFILES)}")
    kind = device.split(":")[0]
    grid = PROFILES[profile]
    if kind == "cpu":
        grid = replace(grid, **ON_CPU.get(profile, {}))
    elif profile != "smoke":
        grid = replace(grid, dtypes=("bfloat16", "float16"), modes=MODES["cuda"])
    chosen = {name: value for name, value in given.items() if value is not None}
    # axes that are named are crossed with the rest
    vary = tuple(axis for axis in grid.vary if AXES[axis] not in chosen)
    grid = replace(grid, **chosen, vary=vary)
    for option, values, known in (
        ("--phases", grid.phases, PHASES),
        ("--dtypes", grid.dtypes, DTYPES),
        ("--modes", grid.modes, MODES.get(kind, MODES["cpu"])),
    ):
        for value in (value for value in values if value not in known):
            raise InputError(f"{option} is '{value}'; expected one of {', '.join(known)}")
    for option, numbers in (("--batch", grid.batch), ("--programs", grid.programs)):
        for number in numbers:
            if not 1 <= number <= 4096:
                raise InputError(f"{option} is {number}; expected 1 to 4096")
    for blocks in grid.steered:
        if blocks is not None and blocks < 1:
            raise InputError(f"--steered-layers is {blocks}; expected 1 or more, or 'all'")
    if not 7 <= grid.rounds <= 10_000:
        raise InputError(
            f"--rounds is {grid.rounds}; expected 7 to 10000: with fewer no interval holds 95 %"
        )
    if grid.layers is not None and grid.layers < 1:
        raise InputError(f"--layers is {grid.layers}; expected 1 or more")
    if not any(True for _ in grid.combinations()):
        raise InputError(f"no cell: {min(grid.programs)} programs need a batch as large")
    return grid
