"""The rules of the house that no linter knows: `docs/contributing.md`."""

import ast
import collections
import pkgutil
from pathlib import Path

import mutants

import refusal_kernels as rk

PACKAGE = Path(rk.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
TESTS = Path(__file__).parent
TEST_TREES = {path: ast.parse(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in TREES}
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}


def test_no_two_classes_share_a_name():
    places = collections.defaultdict(list)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_module_imports_a_private_name_of_another():
    private = [
        f"{path}:{node.lineno} {alias.name}"
        for path, tree in [*TREES.items(), *TEST_TREES.items()]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refusal_kernels")
        for alias in node.names
        if alias.name.startswith("_") and alias.name not in ("_C", "__version__")
    ]
    assert private == []


def test_no_name_of_a_package_hides_a_module_of_it():
    """Else `import package.name` and `package.name` are two things."""
    hidden = []
    for path, tree in TREES.items():
        if path.name != "__init__.py":
            continue
        package = ".".join(["refusal_kernels", *path.parent.relative_to(PACKAGE).parts])
        names = {child.stem for child in path.parent.iterdir() if not child.name.startswith("_")}
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in names:
                hidden.append(f"{package}.{node.name}")
            if isinstance(node, ast.ImportFrom) and node.module != package:
                here = (alias.asname or alias.name for alias in node.names)
                hidden += [f"{package}.{name}" for name in here if name in names]
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    hidden += [name for name in rk.__all__ if name in modules and name != "ops"]
    assert hidden == []


def test_every_mutant_changes_a_text_that_occurs_once():
    assert len(mutants.MUTANTS) >= 30
    for mutant in mutants.MUTANTS:
        assert mutant.applied() != mutant.path().read_text()
        named = [part for part in mutant.tests.split() if part.startswith("tests/")]
        assert named and all((mutants.ROOT / part).exists() for part in named), mutant.tests
