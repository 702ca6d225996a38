"""One process, one thread, no hub; every engine is closed before the next starts.

``--runner`` chooses vLLM's model runner for the whole run: V2, the default wherever Triton is
usable, here with interpreted kernels; or V1, which vLLM takes on a CPU without them.
"""

import functools
import gc
import os
import sys
from pathlib import Path

import pytest

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
    }
)
os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)  # vLLM itself takes the runner
INTERPRETED_TRITON = str(Path(__file__).parent / "triton_shim")
MODEL_INFOS = Path(sys.prefix) / "vllm-modelinfos"


def pytest_addoption(parser):
    parser.addoption("--runner", choices=("v1", "v2"), default="v2")


def pytest_configure(config):
    """Before anything imports Triton."""
    if config.getoption("--runner") == "v2":
        sys.path.insert(0, INTERPRETED_TRITON)
        folders = (INTERPRETED_TRITON, os.environ.get("PYTHONPATH"))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with the models, the directions, and vLLM's compile cache."""
    path = tmp_path_factory.mktemp("vllm")
    os.environ["VLLM_CACHE_ROOT"] = str(path / "cache")
    # vLLM starts a process to look at each kind of model; what it found may be kept between runs
    (path / "cache").mkdir()
    MODEL_INFOS.mkdir(exist_ok=True)
    (path / "cache" / "modelinfos").symlink_to(MODEL_INFOS)
    return path


@pytest.fixture(scope="session")
def directions(folder):
    """Two orthonormal directions, by name, and their files."""
    import families
    import torch

    import refusal_kernels as rk

    torch.manual_seed(5)
    q, _ = torch.linalg.qr(torch.randn(families.HIDDEN, 2))
    made = {"r": rk.Direction(q[:, 0] * 1.5), "t": rk.Direction(q[:, 1])}
    for name, direction in made.items():
        direction.save(folder / f"{name}.safetensors")
    return made


@pytest.fixture(scope="session")
def steering(folder, directions):
    """Make the plugin's settings with the given programs."""

    def settings(**others):
        files = {name: str(folder / f"{name}.safetensors") for name in directions}
        return {"refusal_kernels": {"directions": files, **others}}

    return settings


@pytest.fixture(scope="session")
def reference(folder, directions):
    """Make a family's model and Hugging Face's tokens, once."""
    import families
    from reference import expected

    @functools.cache
    def made(family):
        path = families.make(family, folder)
        return path, expected(family, path, directions)

    return made


@pytest.fixture
def engines(request):
    """Start engines, one at a time; all are closed at the end."""
    from vllm.distributed import cleanup_dist_env_and_memory

    started = []

    def close():
        started.clear()
        gc.collect()
        cleanup_dist_env_and_memory()
        gc.collect()

    def start(path, settings=None, **options):
        close()
        started.append(start_engine(path, settings, **options))
        v2 = started[-1].llm_engine.vllm_config.use_v2_model_runner
        assert v2 == (request.config.getoption("--runner") == "v2")
        return started[-1]

    yield start
    close()


def start_engine(path, settings=None, **options):
    from vllm import LLM

    common = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 128,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 64 << 20,
        "dtype": "float32",
        "additional_config": settings or {},
    }
    return LLM(model=path, **{**common, **options})
