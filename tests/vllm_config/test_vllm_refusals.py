"""Engines that cannot be steered are refused by the name of the setting."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from refusal_kernels import InputError
from refusal_kernels.vllm.config import read_settings
from refusal_kernels.vllm.names import KEY, VERSIONS
from refusal_kernels.vllm.refusals import refuse_reading, refuse_unsupported


@pytest.fixture
def config(monkeypatch):
    """A configuration as vLLM makes it, reduced to what is read; and its environment."""
    environment = SimpleNamespace(VLLM_USE_RUST_FRONTEND=False, VLLM_BATCH_INVARIANT=False)
    vllm = ModuleType("vllm")
    vllm.envs = environment
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    hf_config = SimpleNamespace(architectures=["LlamaForCausalLM"])
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            use_ubatching=False, prefill_context_parallel_size=1, use_sequence_parallel_moe=False
        ),
        speculative_config=SimpleNamespace(enable_adaptive_verification=False),
        kv_transfer_config=None,
        model_config=SimpleNamespace(hf_config=hf_config, architecture=None),
        environment=environment,
    )


def test_an_engine_that_can_be_steered_is_not_refused(config):
    refuse_unsupported(config)
    config.speculative_config = None
    refuse_unsupported(config)


@pytest.mark.parametrize(
    ("part", "setting", "value", "words"),
    [
        ("parallel_config", "use_ubatching", True, "microbatches .* splits the tokens"),
        ("parallel_config", "prefill_context_parallel_size", 2, "prefill context parallelism"),
        ("parallel_config", "use_sequence_parallel_moe", True, "sequence-parallel experts"),
        ("speculative_config", "enable_adaptive_verification", True, "only the device knows"),
        ("environment", "VLLM_USE_RUST_FRONTEND", True, "VLLM_USE_RUST_FRONTEND"),
        ("environment", "VLLM_BATCH_INVARIANT", True, "VLLM_BATCH_INVARIANT"),
    ],
)
def test_others_are_refused_by_name(config, part, setting, value, words):
    setattr(getattr(config, part), setting, value)
    with pytest.raises(InputError, match=words):
        refuse_unsupported(config)


@pytest.mark.parametrize(
    ("connector", "inside", "refused"),
    [
        ("NixlConnector", [], None),
        ("HF3FSKVConnector", [], "HF3FSKVConnector"),
        ("MultiConnector", ["NixlConnector", "OffloadingConnector"], None),
        ("MultiConnector", ["NixlConnector", "ExampleConnector"], "ExampleConnector"),
    ],
)
def test_a_connector_that_may_share_prefixes_is_refused(config, connector, inside, refused):
    extra = {"connectors": [{"kv_connector": name} for name in inside]}
    config.kv_transfer_config = SimpleNamespace(
        kv_connector=connector, kv_connector_extra_config=extra
    )
    if refused is None:
        refuse_unsupported(config)
    else:
        with pytest.raises(InputError, match=f"does not support {refused}: it may share"):
            refuse_unsupported(config)


def test_an_architecture_on_no_list_is_refused_before_it_is_loaded(config):
    config.model_config.hf_config.architectures = ["NewForCausalLM"]
    with pytest.raises(InputError, match="NewForCausalLM cannot be steered"):
        refuse_unsupported(config)


def test_processes_that_read_other_programs_do_not_start_together(config, directions, tmp_path):
    directions["r"].save(tmp_path / "r")
    given = {"directions": {"r": str(tmp_path / "r")}, "programs": {"p": {"ablate": "r"}}}
    config.additional_config = {KEY: given}
    config.parallel_config.data_parallel_size = 1
    model = config.model_config
    model.dtype, model.get_hidden_size = torch.float32, lambda: 8
    model.get_total_num_hidden_layers = lambda: 4
    given[VERSIONS] = read_settings(config).versions  # by `serve` or by a front end
    read_settings(config)
    directions["t"].save(tmp_path / "r")
    with pytest.raises(InputError, match=r"files of the programs changed .* or differ between"):
        read_settings(config)


@pytest.mark.parametrize("setting", ["speculative decoding", "enable_batch_sharded_sampling"])
def test_an_engine_whose_logits_would_be_misread_is_refused(config, setting):
    config.speculative_config = None
    config.parallel_config.enable_batch_sharded_sampling = False
    refuse_reading(config)
    if setting == "speculative decoding":
        config.speculative_config = SimpleNamespace()
    else:
        config.parallel_config.enable_batch_sharded_sampling = True
    with pytest.raises(InputError, match=f"requests with {setting}"):
        refuse_reading(config)
