"""What is loaded by an import and by the help texts: nothing that takes long."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest
import torch
from typer.main import get_command

import refusal_kernels
from refusal_kernels import cli
from refusal_kernels.cli import options
from refusal_kernels.ops.registry import constant

HEAVY = {"torch", "transformers", "triton", "jinja2", "matplotlib", "scipy", "sklearn", "vllm"}


def loaded(code):
    """Run Python code in a fresh process; returns what it printed last and its modules."""
    tell = "import atexit, json, sys\natexit.register(lambda: print(json.dumps([*sys.modules])))\n"
    command = [sys.executable, "-c", tell + code]
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


def test_no_help_text_loads_anything_heavy():
    text, modules = loaded(
        "import sys\n"
        "from refusal_kernels import cli\n"
        "for command in ('', *(function.__name__ for function in cli.commands())):\n"
        "    sys.argv = ['refusal-kernels', *command.split(), '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit as end: assert not end.code\n"
    )
    assert text.count("Usage:") > 10
    assert not modules & {*HEAVY, "pydantic", "numpy"}


def test_a_bad_value_is_refused_before_anything_heavy_loads():
    arguments = "import sys; sys.argv[1:] = ['doctor', '--dtype', 'int8']\n"
    code = "try: cli.main()\nexcept SystemExit as end: print(end.code)\n"
    text, modules = loaded(f"{arguments}from refusal_kernels import cli\n{code}")
    assert text == "2" and not modules & HEAVY


@pytest.mark.parametrize(
    ("module", "constant"),
    [
        ("bench.grid", "PROFILES"),
        ("bench.shapes", "SHAPES"),
        ("hf.embedded", "EMBEDDED"),
        ("research.evaluation.judges", "JUDGES"),
        ("research.evaluation.tasks", "MATCHES"),
        ("research.extraction.methods", "FITS"),
    ],
)
def test_names_are_read_from_the_source(module, constant):
    values = getattr(importlib.import_module(f"refusal_kernels.{module}"), constant)
    assert options.names(module, constant) == tuple(values)


def test_options_are_uniform():
    """An option has one meaning and one default over all commands; what loads a model has three."""
    loading = {"--model", "--device", "--dtype"}  # the fields of LoadingOptions
    shared = (*loading, "--batch-size", "--seed", "--json", "--system")
    seen = {}
    for name, command in get_command(cli.app).commands.items():
        parameters = {option: p for p in command.params for option in p.opts}
        assert "--json" in parameters, f"{name} has no --json: options.Json"
        if name != "bench":  # it takes lists of them
            missing = loading - set(parameters)
            assert missing in (set(), loading), f"{name} loads a model without {missing}"
        for option in set(shared) & set(parameters):
            p = parameters[option]
            if name != "bench" or option in ("--device", "--json"):
                assert seen.setdefault(option, (p.default, p.help)) == (p.default, p.help), name
    assert set(seen) == set(shared)


def test_the_ops_load_no_compiler():
    _, modules = loaded(
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch\n"
        "import refusal_kernels as rk\n"
        "assert torch.ops.refusal_kernels.add_steer\n"
        "rk.patch, rk.Ablate\n"
    )
    assert "refusal_kernels.ops.registry" in modules
    assert not modules & {"torch._dynamo", "torch._inductor", "transformers", "jinja2"}
    assert "triton" not in modules or torch.backends.cuda.is_built()


def test_constant_is_what_torch_calls_it():
    assert vars(constant(lambda: 0)) == vars(torch.compiler.assume_constant_result(lambda: 0))
