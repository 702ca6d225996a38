"""How models are loaded: where they go, in which precision, with which code and adapter."""

import builtins
import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from tiny import run_command, tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels import toy
from refusal_kernels.cli.groups import LoadingOptions
from refusal_kernels.hf import load as loading
from refusal_kernels.hf.load_options import LoadOptions
from refusal_kernels.hf.memory import block_devices, free_bytes, held_bytes, needed_bytes

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "model"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_every_command_has_the_options_of_load():
    ours = {field.name: field.default for field in fields(LoadOptions)}
    command = {field.name: field.default for field in fields(LoadingOptions)}
    assert command == {"model": "toy", **ours}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of auto, float32"),
        ({"load_in": "2bit"}, "load_in is '2bit'; expected one of 8bit, 4bit"),
        ({"attn": "none"}, "attn is 'none'; expected one of eager, sdpa"),
        ({"tensor_parallel": True}, "needs the processes of torchrun"),
        ({"revision": "main"}, "revision 'main': .* is no repository of the hub"),
        ({"adapter": "./nothing"}, "adapter './nothing': there is no such folder"),
        ({"device": "warp"}, "device 'warp'"),
    ],
)
def test_what_can_not_be_is_said_first(folder, options, message, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", None)  # nothing is loaded
    with pytest.raises(rk.InputError, match=message):
        rk.load(str(folder), **options)


def test_what_from_pretrained_is_told(folder, monkeypatch):
    """No prompt at the terminal, and on accelerators no whole copy in main memory first."""
    told = []

    def remember(*_, **options):
        told.append(options)
        raise OSError("enough")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", remember)

    def options(**given):
        with pytest.raises(rk.InputError, match="enough"):
            rk.load(str(folder), **given)
        return told[-1]

    here = options(device="cpu", offline=True, attn="eager")
    assert here["trust_remote_code"] is False and here["local_files_only"] is True
    assert here["attn_implementation"] == "eager" and "device_map" not in here
    gpu = torch.device("meta", 1)  # any device that this machine has and that is no CPU
    monkeypatch.setattr(loading, "find_device", lambda _: gpu)
    assert options()["device_map"] == "auto"
    assert options(device="meta:1")["device_map"] == {"": gpu}
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert options()["device_map"] == {"": gpu}  # each process has its own


def test_code_of_a_model_runs_only_if_it_is_trusted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "own"
    tiny_model().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_code'\n"
    )
    (path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "own_code"
    config["auto_map"] = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("it asks"))
    assert run_command("generate", "paint the box", "--model", path) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.endswith("brings code of its own; read it, then give --trust-remote-code")
    rk.Direction(torch.ones(64)).save(tmp_path / "r.safetensors")
    edit = ["orthogonalize", "--model", path, "--direction", tmp_path / "r.safetensors"]
    edit += ["--device", "cpu", "--out", tmp_path / "edited"]
    assert run_command(*edit) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.endswith("brings code of its own; read it, then give --trust-remote-code")
    assert run_command("doctor", "--model", path, "--trust-remote-code") == 0
    assert "weights loaded in float32" in capsys.readouterr().out
    model, _ = rk.load(str(path), "cpu", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits)
    assert run_command(*edit, "--trust-remote-code") == 0


def test_what_transformers_warns_of_is_told(tmp_path, caplog):
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rk.load(str(tmp_path), "cpu")
    assert caplog.messages == []
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rk.load(str(tmp_path), "cpu")
    (said,) = caplog.messages
    assert said.startswith(f"model '{tmp_path}': ") and "factor field must be" in said


def test_a_model_is_quantized_at_load():
    pytest.importorskip("torchao")
    model, _ = rk.load("toy", "cpu", load_in="8bit")
    with torch.no_grad():
        got, want = model(IDS).logits, rk.load("toy", "cpu")[0](IDS).logits
    assert 0 < float((got - want).norm() / want.norm()) < 0.02
    assert held_bytes(model)["int8"] > 3 * held_bytes(model)["float32"]
    with rk.patch(model, rk.Ablate(rk.Direction(torch.randn(128)))) as handle:
        assert "17 of 17 sites steered" in str(handle.report())
    with pytest.raises(rk.InputError, match=r"in a Int8Tensor on cpu; .* neither quantized"):
        rk.orthogonalize(model, rk.Direction(torch.randn(128)))


def test_a_missing_quantizer_is_named(folder, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(rk.InputError, match="'4bit' needs bitsandbytes: pip install it"):
        rk.load(str(folder), "cpu", load_in="4bit")
    with pytest.raises(rk.InputError, match="'8bit' needs torchao or bitsandbytes"):
        rk.load(str(folder), "cpu", load_in="8bit")


def test_adapters(folder, tmp_path):
    peft = pytest.importorskip("peft")

    def saved(name, config):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(tiny_model(), config)
        adapted.save_pretrained(tmp_path / name)
        return adapted.eval()

    lora = saved("lora", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model, _ = rk.load(str(folder), "cpu", adapter=str(tmp_path / "lora"))
    assert type(model).__name__ == "LlamaForCausalLM"  # merged
    torch.testing.assert_close(model(IDS).logits, lora(IDS).logits)

    ranks = peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4)
    ranks.rank_pattern = {f"model.layers.{k}.self_attn.q_proj.lora_E": [True] for k in range(3)}
    adapted = peft.get_peft_model(tiny_model(), ranks)
    for key in ranks.rank_pattern:
        ranks.rank_pattern[key] = [True, False, True, False]
    adapted.base_model.resize_modules_by_rank_pattern(ranks.rank_pattern, "default")
    for name, parameter in adapted.named_parameters():
        if "lora_E" in name:  # zeros, under which the adapter does nothing
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "ranks")
    model, _ = rk.load(str(folder), "cpu", adapter=str(tmp_path / "ranks"))
    torch.testing.assert_close(model(IDS).logits, adapted.eval()(IDS).logits)
    assert not torch.allclose(model(IDS).logits, tiny_model()(IDS).logits)

    prompt = saved("prompt", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model, _ = rk.load(str(folder), "cpu", adapter=str(tmp_path / "prompt"))
    torch.testing.assert_close(model(IDS).logits, prompt(IDS).logits)

    from safetensors.torch import load_file, save_file

    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {name.replace("q_proj", "down_proj"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, file)
    words = (
        r"adapter '.*lora' does not fit: its file holds \S+down_proj\S+, which its configuration"
    )
    with pytest.raises(rk.InputError, match=words):
        rk.load(str(folder), "cpu", adapter=str(tmp_path / "lora"))
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    with pytest.raises(rk.InputError, match=r"adapter '.*lora' does not fit: Found missing"):
        rk.load(str(folder), "cpu", adapter=str(tmp_path / "lora"))


def test_what_a_load_takes_and_where_it_is(folder, capsys):
    model = tiny_model()
    plain = sum(p.numel() for p in model.parameters())
    assert held_bytes(model)["float32"] >= 4 * plain
    needed = needed_bytes(model.config)
    assert needed["float32"] == 4 * plain and needed["bfloat16"] == 2 * plain
    assert needed["4bit"] < needed["8bit"] < needed["bfloat16"]
    assert block_devices(model) == {"cpu": [0, 1, 2]}
    assert free_bytes()["cpu"] > 0
    model.model.layers[1].to("meta")
    assert block_devices(model) == {"cpu": [0, 2], "offloaded": [1]}

    before = f"\n{folder}: weights loaded in float32 0."
    assert run_command("doctor", "--model", folder) == 0
    text = capsys.readouterr().out
    assert text.startswith("free memory: cpu ") and before in text
    printed = " ".join(text.split())
    assert "0 to 2 on cpu" in printed and "float32" in printed and "MB" in printed


@pytest.mark.full
def test_two_processes_share_a_model(tmp_path):
    """Extraction and selection, as they are typed, beside one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    few = ["--split", "all"]
    for category in ("harmful", "harmless"):
        (tmp_path / f"{category}.txt").write_text("\n".join(toy.prompts(category, "train")[:8]))
        few += [f"--{category}", f"{tmp_path}/{category}.txt"]

    def run(name, *launcher, options=()):
        for command, out in (("extract", "candidates"), ("select", "direction")):
            file = f"{tmp_path}/{name}-{out}.safetensors"
            files = [*few, "--out", file]
            if command == "select":
                files += ["--candidates", f"{tmp_path}/{name}-candidates.safetensors"]
                files += ["--json", f"{tmp_path}/{name}.json"]
            done = subprocess.run(
                [sys.executable, *launcher, "-m", "refusal_kernels", command, *files, *options],
                env=environment, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert done.stdout.count(f"written: {file}") == 1  # by the first process alone
        candidates = rk.Candidates.load(f"{tmp_path}/{name}-candidates.safetensors").vectors
        return candidates, json.loads((tmp_path / f"{name}.json").read_text())

    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one, chosen = run("one")
    two, shared = run("two", *launcher, options=["--tensor-parallel"])
    assert float((one - two).norm(dim=-1).max() / one.norm(dim=-1).max()) < 1e-5
    assert (chosen["position"], chosen["layer"]) == (shared["position"], shared["layer"])
    for row, other in zip(chosen["candidates"], shared["candidates"], strict=True):
        for score in ("bypass", "induce", "kl"):
            assert row[score] == pytest.approx(other[score], abs=1e-5)
    assert not list(tmp_path.glob("*.part*"))
