import os

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from refusal_kernels import _C

EXERCISED: dict[str, int] = {}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Use one: tiny products gain nothing from more, and busy threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_runtest_logreport(report):
    backend = dict(report.user_properties).get("backend")
    if report.when == "call" and backend and report.passed:
        EXERCISED[backend] = EXERCISED.get(backend, 0) + 1


def pytest_terminal_summary(terminalreporter):
    if EXERCISED:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(EXERCISED.items()))
        terminalreporter.write_line(f"op tests passed per backend: {counts}")
        terminalreporter.write_line(f"extension: {_C.__file__}")
