"""The bars of the command line: how much, how fast, since when, for how much longer."""

import io

import pytest
from rich.console import Console

from refusal_kernels.cli import common


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
    with common.progress_bars() as step:
        tell = step("A step whose description is far too long for eighty columns")
        for batch in range(1, 5):
            now[0] += seconds
            tell(batch * count, 20_000)
    last = screen.getvalue().replace("\x1b[?25h", "").splitlines()[-1].rpartition("\x1b[2K")[-1]
    assert " ".join(last.split()).endswith(shown)
    assert len(last) <= 80


def test_nothing_is_shown_where_another_process_shows_it(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(common, "errors", Console(file=screen, force_terminal=True))
    with common.progress_bars(visible=False) as step:
        step("Extract")(1, 2)
    assert screen.getvalue() == ""
