"""Serve methods, or engines: python refusal_kernels/bench/worker/__main__.py [engines].

This folder becomes a package of its own, since the package it is in need not be installed. It does
so also in the processes that an engine spawns, which import this file but do not serve.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

NAME = "bench_worker"

spec = importlib.util.spec_from_file_location(NAME, Path(__file__).with_name("__init__.py"))
assert spec is not None and spec.loader is not None
sys.modules[NAME] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[NAME])

if __name__ == "__main__":
    serve = importlib.import_module(f"{NAME}.serve")
    if sys.argv[1:] == ["engines"]:
        serve.main(importlib.import_module(f"{NAME}.engines").EngineServer())
    else:
        serve.main(serve.MethodServer())
