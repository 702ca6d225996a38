import os

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

EXERCISED: dict[str, int] = {}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_runtest_logreport(report):
    backend = dict(report.user_properties).get("backend")
    if report.when == "call" and backend and report.passed:
        EXERCISED[backend] = EXERCISED.get(backend, 0) + 1


def pytest_terminal_summary(terminalreporter):
    if EXERCISED:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(EXERCISED.items()))
        terminalreporter.write_line(f"op tests passed per backend: {counts}")
