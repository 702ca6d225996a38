"""How far the work is: bars on a terminal, and plain lines in a log."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich import progress
from rich.table import Column
from rich.text import Text

from refusal_kernels.cli import common
from refusal_kernels.progress import Progress, Step, no_step

SPEED_S = 600.0  # the rate is that of the last ten minutes: a batch of a large model takes one
LINE_S = 30.0  # between two lines of a log


@contextmanager
def progress_bars(visible: bool = True) -> Iterator[Step]:
    """Give the `Step` that shows how much is done, how fast, since when, and what is left.

    On a terminal it is a bar; elsewhere a line every `LINE_S` seconds, and one at the step's end.
    """
    if not visible or common.console.quiet:
        yield no_step
    elif common.errors.is_terminal:
        with _bars() as step:
            yield step
    else:
        lines = ProgressLog()
        try:
            yield lines.step
        finally:
            lines.close()


def _rate(speed: float) -> str:
    """Say a speed: items a second, or seconds an item if one takes longer."""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        """Show nothing until something is done."""
        speed = task.finished_speed or task.speed
        return Text(_rate(speed) if speed else "")


@contextmanager
def _bars() -> Iterator[Step]:
    bars = progress.Progress(
        progress.TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
        progress.BarColumn(16),
        progress.MofNCompleteColumn(),
        _Rate(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=common.errors,
        speed_estimate_period=SPEED_S,
        expand=True,
    )

    def step(description: str) -> Progress:
        task = bars.add_task(description, total=None)
        return lambda done, total: bars.update(task, completed=done, total=total)

    with bars:
        yield step


class _LoggedStep:
    """One step: its description, and how much was done when."""

    def __init__(self, description: str) -> None:
        self.description, self.started = description, time.monotonic()
        self.done, self.total = 0, 0
        self.samples: deque[tuple[float, int]] = deque()

    def update(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        self.samples.append((time.monotonic(), done))
        while self.samples[-1][0] - self.samples[0][0] > SPEED_S:
            self.samples.popleft()

    @property
    def finished(self) -> bool:
        return 0 < self.total <= self.done

    def __str__(self) -> str:
        took = timedelta(seconds=int(time.monotonic() - self.started))
        if self.finished:
            return f"{self.description}: done in {took}"
        parts = [f"{self.done}/{self.total}"] if self.total > 1 else []
        if self.samples and self.done > self.samples[0][1]:
            (first, before), (last, _) = self.samples[0], self.samples[-1]
            speed = (self.done - before) / max(last - first, 1e-9)
            left = timedelta(seconds=int((self.total - self.done) / speed))
            parts += [_rate(speed), f"{left} left"]
        return f"{self.description}: {', '.join([*parts, f'{took} so far'])}"


class ProgressLog:
    """Prints a line about the step that runs, every `LINE_S` seconds and when it is done.

    A thread prints, so that work that reports nothing is seen too.
    """

    def __init__(self) -> None:
        self._step = _LoggedStep("Work")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self, description: str) -> Progress:
        """Announce a step; its `Progress` is that of a `Step`."""
        step = self._step = _LoggedStep(description)

        def update(done: int, total: int) -> None:
            known = step.finished
            step.update(done, total)
            if step.finished and not known:
                self._print(step)

        return update

    def close(self) -> None:
        """Print no more."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(LINE_S):
            if self._step.finished:  # the work goes on outside of any step
                self._step = _LoggedStep("Work")
            self._print(self._step)

    def _print(self, step: _LoggedStep) -> None:
        common.errors.print(Text(str(step)), soft_wrap=True)
