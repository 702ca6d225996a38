"""What is loaded by an import and by the help texts: nothing that takes long."""

import json
import pkgutil
import subprocess
import sys

import pytest

import refusal_kernels

HEAVY = {"torch", "transformers", "triton", "jinja2", "matplotlib", "scipy", "sklearn", "vllm"}


def loaded(code, *arguments):
    """Run Python code in a fresh process; returns what it printed last and its modules."""
    tell = "import atexit, json, sys\natexit.register(lambda: print(json.dumps([*sys.modules])))\n"
    command = [sys.executable, "-c", tell + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text, _, modules = done.stdout.rstrip().rpartition("\n")
    return text, set(json.loads(modules))


def test_the_import_loads_nothing_heavy():
    _, modules = loaded("import refusal_kernels as rk; rk.__version__; rk.InputError; dir(rk)")
    assert "refusal_kernels.errors" in modules
    assert not modules & HEAVY


def test_the_extension_loads_before_torch():
    text, _ = loaded("from refusal_kernels import _C; print(_C.cpu_capabilities()[0])")
    assert text


def test_every_public_name_is_there():
    submodules = {module.name for module in pkgutil.iter_modules(refusal_kernels.__path__)}
    for name in refusal_kernels.__all__:
        assert getattr(refusal_kernels, name).__name__.rpartition(".")[2] == name
        assert name == "ops" or name not in submodules
    assert set(refusal_kernels.__all__) < set(dir(refusal_kernels))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = refusal_kernels.nonsense
