import collections
import os
from pathlib import Path

import torch

# Before anything imports triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import emulated_cuda
import pytest
from backends import DEVICES, EMULATED, GPU

from refusal_kernels import _C, ops

OPS = Path(__file__).parent / "ops"
EXERCISED: dict[str, int] = {}


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """Mark the tests that share a fixture of their module; leave out cases of Triton's kernels.

    The first run in one process, so that the fixture is made once. Triton's interpreter is slow:
    the quick tests run every eleventh case, the full ones also every fifth, numbers that share no
    factor with most products of parameters. A GPU runs all.
    """
    cases, left_out = collections.Counter(), set()
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == "module" for versions in fixtures for fixture in versions):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") == "triton" and not GPU:
            number = cases[item.function]
            cases[item.function] += 1
            if number % 11:
                item.add_marker(pytest.mark.full)
                if number % 5:
                    left_out.add(item)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_sessionstart(session):
    # tiny products gain nothing from more, and busy threads wait for each other
    torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Compile the kernels that play a GPU, a minute or two, where a test of the ops runs."""
    if EMULATED and any("backend" in i.fixturenames or i.path.parent == OPS for i in session.items):
        emulated_cuda.register()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=DEVICES)
def backend(request, record_property):
    """Run the test on every backend; tensors that it makes are on that backend's device."""
    device = DEVICES[request.param]
    why = ops.BACKENDS[request.param].why_not(device, torch.float32)
    if why == "triton is not installed":
        pytest.skip("there is no Triton for this platform")
    assert why is None, f"{request.param} was built but cannot be exercised: {why}"
    record_property("backend", request.param)
    with ops.use_backend(request.param), torch.device(device):
        yield request.param


def pytest_runtest_logreport(report):
    backend = dict(report.user_properties).get("backend")
    if report.when == "call" and backend and report.passed:
        EXERCISED[backend] = EXERCISED.get(backend, 0) + 1


def missing(config):
    """Return the backends that were built and not exercised, once a whole tier has run."""
    narrowed = config.args != config.getini("testpaths")
    narrowed = narrowed or config.option.keyword or config.option.lf or config.option.collectonly
    a_worker = hasattr(config, "workerinput")  # xdist: it has a share of the tests
    if narrowed or a_worker or config.option.markexpr not in ("", "not full"):
        return []
    # the process that hands out the tests to others runs none, and has no emulator
    served = {
        name
        for name, device in DEVICES.items()
        if name not in ops.BACKENDS or ops.BACKENDS[name].why_not(device, torch.float32) is None
    }
    return sorted(served - set(EXERCISED))


def pytest_sessionfinish(session, exitstatus):
    if not exitstatus and missing(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if EXERCISED:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(EXERCISED.items()))
        terminalreporter.write_line(f"op tests passed per backend: {counts}")
        terminalreporter.write_line(f"extension: {_C.__file__}")
    for name in missing(config):
        terminalreporter.write_line(f"FAILED: the backend {name} was built and not exercised")
