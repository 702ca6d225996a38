"""Directional steering of a language model's residual stream, at the speed of the unmodified model.

>>> import refusal_kernels as rk
>>> direction = rk.Direction.load("refusal.safetensors")  # doctest: +SKIP
>>> with rk.patch(model, rk.Ablate(direction)):  # doctest: +SKIP
...     model.generate(**inputs)

``__init__.pyi`` lists the public names, one import a line; each is loaded when it is first used.
Where torch is loaded already, ``torch.ops.refusal_kernels`` is registered at once; else by
``import refusal_kernels.ops``.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_MODULES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Load a public name, and keep it."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("refusal-kernels")
    elif name == "_C":
        import torch  # noqa: F401  (the extension needs its libraries)

        value = import_module("refusal_kernels._C")
    elif name not in _MODULES:
        raise AttributeError(f"module 'refusal_kernels' has no attribute '{name}'")
    elif _MODULES[name] == "refusal_kernels":
        value = import_module(f"refusal_kernels.{name}")
    else:
        value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if "torch" in sys.modules:
    import_module("refusal_kernels.ops")
