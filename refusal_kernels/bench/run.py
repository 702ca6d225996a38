"""The run: cell by cell every method is checked, then all take turns until the time is up."""

import datetime
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from refusal_kernels.bench import results, shapes
from refusal_kernels.bench.catalog import HERE, BenchMethod
from refusal_kernels.bench.checks import compare
from refusal_kernels.bench.grid import BenchCell
from refusal_kernels.bench.process import Process, WorkerError
from refusal_kernels.bench.records import rounded
from refusal_kernels.bench.settings import BenchSettings, earlier_rows
from refusal_kernels.bench.worker import BASE
from refusal_kernels.bench.worker.models import load
from refusal_kernels.bench.worker.serve import shuffled
from refusal_kernels.environment import clock_mhz
from refusal_kernels.errors import InputError, first_line

LEAST_ROUNDS = 7  # six are needed for an interval; one may be lost to a method that dies
LEAST_S = 30.0  # of rounds, also where preparing took all of the cell's time
SLOW = 10  # an environment that takes this many times the quickest's time gets the fewest rounds
GIVE_UP = 2  # a worker that failed this often in a row is not started again


class Run:
    """One run and its document, which is written anew after every cell.

    To resume is to keep the rows of the run that is in the output folder, if it is one like this.
    ``say`` is called with a text, the number of cells done and the number of all cells.
    """

    def __init__(
        self,
        settings: BenchSettings,
        resume: bool = False,
        say: Callable[[str, int, int], None] = lambda text, done, total: None,
    ) -> None:
        self.settings, self.say = settings, say
        self.start = time.monotonic()
        torch.set_num_threads(settings.threads)
        self.comparable = settings.comparable()  # now: the checkout may be edited during the run
        self.rows: list[dict[str, Any]] = []
        self.kept = results.by_cell(earlier_rows(settings.path, self.comparable) if resume else ())
        self.workers: dict[str, Process] = {}
        self.failures: dict[str, int] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.about: dict[str, str] = {}
        self.shortest = 0.0
        self.done, self.total = 0, 0
        self.folder = Path()

    def __call__(self) -> dict[str, Any]:
        """Measure everything. Ctrl-C writes what was measured and is raised again."""
        complete, plan = False, self._plan()
        self.folder = Path(tempfile.mkdtemp(prefix="refusal_kernels-bench-"))
        try:
            self.total = sum(len(cells) for _, cells in plan)
            for config, cells in plan:
                self._model(config, cells)
            complete = True
        finally:
            for worker in self.workers.values():
                worker.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
            document = self.write(complete)
        return document

    def _plan(self) -> list[tuple[Any, list[BenchCell]]]:
        """Return the cells of each model and dtype, the models' weights loaded once.

        With each its configuration, cut to as many layers as fit; None if none does.
        """
        grid, plan = self.settings.grid, []
        for name in grid.models:
            config, room = shapes.config_of(name), shapes.free_memory()
            text = config.get_text_config(decoder=True)
            if self._on_gpu():  # where every worker has weights of its own, and the reference
                room = min(room, torch.cuda.mem_get_info()[0] / (1 + len(self.groups)))
            fits = {dtype: shapes.layers_that_fit(config, dtype, room) for dtype in grid.dtypes}
            # a dtype that does not fit must not be the one that the other axes are measured in
            dtypes = tuple(sorted(grid.dtypes, key=lambda dtype: not fits[dtype]))
            random = name in shapes.SHAPES
            most = grid.layers or (grid.most_layers(config) if random else None)
            for dtype in dtypes:
                fit = fits[dtype]
                layers = max(1, min(text.num_hidden_layers, most or fit, fit))
                cells = replace(grid, dtypes=dtypes).cells(name, layers, text)
                cells = [cell for cell in cells if cell.dtype == dtype]
                plan.append((shapes.cut(deepcopy(config), layers) if fit else None, cells))
        return plan

    def _model(self, config: Any, cells: list[BenchCell]) -> None:
        """Measure all cells of one model in one dtype."""
        model, name = None, ""
        # a worker that failed with the last model has one more try with this one
        self.failures = {name: min(n, GIVE_UP - 1) for name, n in self.failures.items()}
        for cell in cells:
            if rows := self._kept(cell):
                self.rows += rows
            elif config is None:
                self._all(cell, f"{results.NOT_MEASURED}: one layer does not fit in memory")
            elif self._left() <= self.shortest:
                self._all(cell, self._too_late())
            else:
                try:
                    if model is None:
                        self._say(f"{cell.model}, {cell.dtype}: making the weights")
                        name = f"{cell.model}-{cell.dtype}".replace("/", "-")
                        model = self._weights(cell, config, self.folder / name)
                except InputError:
                    raise
                except Exception as error:
                    self._all(cell, f"failed: {type(error).__name__}: {first_line(error)[:300]}")
                    continue
                start = time.monotonic()
                self._cell(cell, model, self.folder / name)
                self._say(f"{cell}: {time.monotonic() - start:.0f} s")
            self.done += 1
            self.write(complete=False)
        del model
        if name:  # weights of a large model fill a disk
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _weights(self, cell: BenchCell, config: Any, folder: Path) -> Any:
        built = shapes.build(cell.model, config, cell.dtype)
        built.save_pretrained(folder, max_shard_size="10000GB")  # one file
        del built
        # from the file, as the workers load it; a GPU is faster, also in float64
        return load(str(folder), cell.dtype, self.settings.device if self._on_gpu() else "cpu")

    def _on_gpu(self) -> bool:
        return self.settings.device.startswith("cuda")

    def _kept(self, cell: BenchCell) -> list[dict[str, Any]]:
        """Return a cell's rows of the earlier run, if every method has one that holds."""
        rows = {row["method"]: row for row in self.kept.get(tuple(asdict(cell).values()), ())}
        wanted = [method.name for method in self.settings.methods]
        held = [rows[n] for n in wanted if n in rows]
        again = any(row["status"].startswith(results.NOT_MEASURED) for row in held)
        return held if len(held) == len(wanted) and not again else []

    def _left(self) -> float:
        return self.settings.grid.limit_s - (time.monotonic() - self.start)

    def _too_late(self) -> str:
        minutes = self.settings.grid.limit_s / 60
        return f"{results.NOT_MEASURED}: the limit was reached (--minutes {minutes:g})"

    def _say(self, text: str) -> None:
        self.say(text, self.done, self.total)

    def _row(self, cell: BenchCell, method: str, status: str) -> dict[str, Any]:
        return {**results.USUAL, **asdict(cell), "method": method, "status": status}

    def _all(self, cell: BenchCell, status: str) -> None:
        self.rows += [self._row(cell, method.name, status) for method in self.settings.methods]

    def _cell(self, cell: BenchCell, model: Any, folder: Path) -> None:
        start = time.monotonic()
        budget = self._left() / max(1, self.total - self.done)
        rows = {m.name: self._row(cell, m.name, results.OK) for m in self.settings.methods}
        kept = len(self.rows)
        # until the last round has ended
        self._all(cell, f"{results.NOT_MEASURED}: the run was stopped")
        directions = shapes.directions_of(model, cell.programs)
        file = self.folder / "directions.safetensors"  # an engine reads all of the model's folder
        save_file({"directions": directions}, str(file))
        opened = self._open_all(cell, folder, file, rows)
        compare(cell, model, directions, folder, rows, opened)
        opening = time.monotonic() - start
        until = start + max(budget, opening + LEAST_S)
        rounds, per_round = self._rounds(cell, rows, opened, until)
        self.shortest = opening + LEAST_ROUNDS * per_round
        for name, (seconds, base) in rounds.items():
            row = rows[name]
            if len(seconds) >= LEAST_ROUNDS - 1:
                tokens = cell.batch * (1 if cell.work == "decode" else cell.tokens)
                results.rated(row, seconds, base, tokens)
            elif row["status"] == results.OK:
                row["status"] = "failed: too few rounds ended"
        for row in rows.values():
            row["verdict"] = results.verdict(row)
        self.rows[kept:] = rows.values()

    @cached_property
    def groups(self) -> dict[str, list[BenchMethod]]:
        """The methods of every environment; the unmodified model is in all of them."""
        base = next(m for m in self.settings.methods if m.name == BASE)
        groups: dict[str, list[BenchMethod]] = {HERE: []}
        for method in self.settings.methods:
            groups.setdefault(method.environment, [] if method.environment == HERE else [base])
            groups[method.environment].append(method)
        return groups

    def _open_all(
        self, cell: BenchCell, folder: Path, file: Path, rows: dict[str, dict[str, Any]]
    ) -> dict[str, list[str]]:
        """Have every worker prepare the cell; return the methods that are ready, by worker."""
        opened: dict[str, list[str]] = {}
        for name, methods in self.groups.items():
            here = [m for m in methods if m.name != BASE or name == HERE]
            reason = next((m.missing for m in methods if m.missing), None)
            if reason is None and self.failures.get(name, 0) >= GIVE_UP:
                reason = f"not run: it failed {GIVE_UP} times in a row"
            if reason is None and self._left() <= 0:
                reason = self._too_late()
            self._say(f"{cell}: preparing {name}")
            order = {
                "do": "open",
                "cell": asdict(cell),
                "folder": str(folder),
                "device": self.settings.device,
                "threads": self.settings.threads,
                "methods": {m.name: [str(m.file), m.variant] for m in methods},
                "rows": cell.rows,
                "layers": cell.steered_blocks,
                "directions": str(file),
                "measure_s": self.settings.grid.measure_s,
                "logits": str(folder / f"{name.replace(' ', '-')}-{{}}.logits"),
            }
            try:
                if reason is not None:
                    raise WorkerError(reason)
                answer = self._ask(name, order)
            except WorkerError as error:
                for method in here:
                    rows[method.name]["status"] = str(error)
                continue
            self.environments[name] = answer["versions"]
            prepared = answer["methods"]
            for method in here:
                rows[method.name] |= prepared[method.name]
                self.about[method.name] = rows[method.name].pop("about", "")
                if name != HERE:
                    rows[method.name]["base_memory_mib"] = prepared[BASE].get("memory_mib")
            if prepared[BASE]["status"] == results.OK:
                opened[name] = [m.name for m in here if rows[m.name]["status"] == results.OK]
        for method in self.groups[HERE]:
            rows[method.name]["base_memory_mib"] = rows[BASE]["memory_mib"]
        return opened

    def _ask(self, name: str, order: dict[str, Any]) -> dict[str, Any]:
        """Ask a worker, started where it does not run; count how often it fails in a row."""
        try:
            if name not in self.workers:
                packages = name.replace("_", "-").replace("transformerlens", "transformer-lens")
                log, last = self.folder / f"{name.replace(' ', '-')}.log", self.groups[name][-1]
                here, threads = name in (HERE, "vllm"), self.settings.threads
                self.workers[name] = Process(last.python, log, here, threads, packages, last.engine)
            answer = self.workers[name].ask(order, self.settings.answer_s)
        except WorkerError:
            self.workers.pop(name, None)
            self.failures[name] = self.failures.get(name, 0) + 1
            raise
        if order["do"] == "round":
            self.failures[name] = 0
        return answer

    def _rounds(
        self,
        cell: BenchCell,
        rows: dict[str, dict[str, Any]],
        opened: dict[str, list[str]],
        until: float,
    ) -> tuple[dict[str, tuple[list[float], list[float]]], float]:
        """Let all take turns; return the seconds of every method and of its unmodified model."""
        times: dict[str, tuple[list[float], list[float]]] = {
            name: ([], []) for methods in opened.values() for name in methods
        }
        taken = dict.fromkeys(opened, 0.0)
        slow: list[str] = []
        start, number, per_round, last = time.monotonic(), 0, 0.0, 0.0
        while number < self.settings.grid.rounds:
            begun = time.monotonic()
            if number == LEAST_ROUNDS:
                share = {name: taken[name] / len(self.groups[name]) for name in opened}
                # those that would take the rounds from all others: a cell is short
                slow = [name for name in share if share[name] > SLOW * min(share.values())]
                until = max(until, begun + LEAST_S) if slow else until
                last -= sum(taken[name] for name in slow) / number
            if number >= LEAST_ROUNDS and begun + last > until:
                break
            self._say(f"{cell}: round {number + 1}")
            names = [name for name in opened if name not in slow]
            for name in shuffled(names, number):
                order = {"do": "round", "number": number}
                turn = time.monotonic()
                try:
                    answer = self._ask(name, order)
                except WorkerError as error:
                    for method in opened.pop(name):
                        rows[method]["status"] = str(error)
                    continue
                taken[name] += time.monotonic() - turn
                seconds = answer["seconds"]
                for method in list(opened[name]):
                    if method in answer["errors"] or BASE not in seconds:
                        rows[method]["status"] = answer["errors"].get(method, "failed: no base")
                        opened[name].remove(method)
                        continue
                    times[method][0].append(seconds[method])
                    times[method][1].append(seconds[BASE])
            number += 1
            last = time.monotonic() - begun
            if number <= LEAST_ROUNDS:
                per_round = (time.monotonic() - start) / number
            if (LEAST_ROUNDS - number) * per_round > max(0.0, self._left()):
                for name in (name for methods in opened.values() for name in methods):
                    rows[name]["status"] = self._too_late()
                break
        for name in list(opened):
            with suppress(WorkerError):
                self._ask(name, {"do": "close"})
        bad = [name for name in times if rows[name]["status"] != results.OK]
        return {name: both for name, both in times.items() if name not in bad}, per_round

    def write(self, complete: bool) -> dict[str, Any]:
        """Write the document, and return it."""
        settings = self.settings
        # rows of an earlier run that this one has not reached are kept
        come = set(results.by_cell(self.rows))
        rest = [row for key, rows in self.kept.items() if key not in come for row in rows]
        document = rounded({
            "what": "tokens/s over the unmodified model's, interleaved round by round",
            "device": self.comparable["device"],
            "versions": self.comparable["versions"],
            "profile": settings.profile,
            "date": datetime.date.today().isoformat(),
            "measure_s": settings.grid.measure_s,
            "limit_s": settings.grid.limit_s,
            "rounds": settings.grid.rounds,
            "device_kind": settings.device.split(":")[0],
            "environments": self.environments,
            "methods": {m.name: [m.given, self.about.get(m.name, "")] for m in settings.methods},
            "torch_threads": settings.threads,
            "clock_mhz": clock_mhz(settings.device),
            "load": os.getloadavg()[0],
            "seconds": round(time.monotonic() - self.start),
            "complete": complete,
            "rows": self.rows + ([] if complete else rest),
        })  # fmt: skip
        results.write_results(settings.path.with_suffix(".jsonl"), document)
        return document
