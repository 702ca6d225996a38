"""The progress of the command line: how much, how fast, since when, for how much longer."""

import io
import time

import pytest
from rich.console import Console

from refusal_kernels.cli import bars, common


@pytest.mark.parametrize(
    ("seconds", "count", "shown"),
    [
        (2.0, 32, "128/20000 16.0/s 0:00:08 0:20:42"),  # 32 in two seconds: 19872 take 1242
        (50.0, 10, "40/20000 5.0 s each 0:03:20 27:43:20"),
    ],
)
def test_rate_and_time_left(monkeypatch, seconds, count, shown):
    now = [0.0]
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, width=80, color_system=None, get_time=lambda: now[0]
    )
    monkeypatch.setattr(common, "errors", console)
    with bars.progress_bars() as step:
        tell = step("A step whose description is far too long for eighty columns")
        for batch in range(1, 5):
            now[0] += seconds
            tell(batch * count, 20_000)
    last = screen.getvalue().replace("\x1b[?25h", "").splitlines()[-1].rpartition("\x1b[2K")[-1]
    assert " ".join(last.split()).endswith(shown)
    assert len(last) <= 80


@pytest.mark.parametrize(
    ("seconds", "count", "shown"),
    [
        (2.0, 32, "A step: 128/20000, 16.0/s, 0:20:42 left, 0:00:08 so far"),
        (50.0, 10, "A step: 40/20000, 5.0 s each, 1 day, 3:43:20 left, 0:03:20 so far"),
    ],
)
def test_a_line_of_a_log(monkeypatch, seconds, count, shown):
    now = [0.0]
    monkeypatch.setattr(bars.time, "monotonic", lambda: now[0])
    step = bars._LoggedStep("A step")
    assert str(step) == "A step: 0:00:00 so far"
    for batch in range(1, 5):
        now[0] += seconds
        step.update(batch * count, 20_000)
    assert str(step) == shown
    step.update(20_000, 20_000)
    assert str(step).startswith("A step: done in ")


def test_a_log_has_a_line_now_and_then(monkeypatch):
    """Also while a step reports nothing, and where there is no step."""
    log = io.StringIO()
    monkeypatch.setattr(common, "errors", Console(file=log))
    monkeypatch.setattr(bars, "LINE_S", 0.05)
    with bars.progress_bars() as step:
        time.sleep(0.12)
        tell = step("Silent")
        tell(0, 1)
        time.sleep(0.12)
        tell(1, 1)
        time.sleep(0.12)
    lines = log.getvalue().splitlines()
    silent = [line for line in lines if line.startswith("Silent")]
    assert len(silent) >= 2 and silent[0] == "Silent: 0:00:00 so far"
    assert silent[-1] == "Silent: done in 0:00:00"
    assert lines[0] == lines[-1] == "Work: 0:00:00 so far"
    count = len(lines)
    time.sleep(0.12)
    assert len(log.getvalue().splitlines()) == count, "a line after the end"


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_where_another_process_shows_it(monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(common, "errors", Console(file=screen, force_terminal=terminal))
    with bars.progress_bars(visible=False) as step:
        step("Extract")(1, 2)
    assert screen.getvalue() == ""
