"""Runs the benchmark in a folder of its own."""

import pytest
from typer.testing import CliRunner

from refusal_kernels.bench import results
from refusal_kernels.cli import app
from refusal_kernels.ops.registry import BACKENDS


@pytest.fixture(autouse=True)
def backends_of_the_package(monkeypatch):
    """Hide the backends of the tests: the benchmark's own processes do not have them."""
    for name in set(BACKENDS) - {"cpu", "cuda", "triton", "reference"}:
        monkeypatch.delitem(BACKENDS, name)


@pytest.fixture
def bench(tmp_path):
    """Run the command with the smoke profile; return its result and what it wrote."""

    def go(*arguments: str):
        given = "bench --profile smoke --threads 1 --device cpu --minutes 10 --out".split()
        result = CliRunner().invoke(app, [*given, str(tmp_path / "out"), *arguments])
        file = tmp_path / "out" / "overhead-cpu.jsonl"
        there = file.is_file() and file.stat().st_size > 2
        return result, results.read_results(file) if there else None

    return go


@pytest.fixture
def method(tmp_path):
    """Write a method's file, and return its path as --methods takes it."""

    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write
