"""What else is done to a model: trained, wrapped, sharded, copied, saved; and the way back."""

import copy
import inspect
import io
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, get_peft_model
from steering import GREEDY, MODES, SITES, close, hooks, wanted
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.patching.handle import unpatch
from refusal_kernels.patching.patch import patch


def traces(model):
    """Everything that a patch could leave something on."""
    return [
        (
            name,
            type(m),
            dir(m),
            sorted(vars(m)),
            list(m._forward_pre_hooks.items()) + list(m._forward_hooks.items()),
            list(m._forward_pre_hooks_with_kwargs) + list(m._forward_hooks_with_kwargs),
            [getattr(vars(m).get(f), "__func__", None) for f in ("forward", "_old_forward")],
            inspect.getsource(type(m).forward),
        )
        for name, m in model.named_modules()
    ]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    return list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def adapted(model, direction, first):
    """Patch a model and give it adapters, in either order; return both."""
    config = LoraConfig(r=4, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    handle = patch(model, Ablate(direction)) if first == "patch" else None
    torch.manual_seed(1)
    lora = get_peft_model(model, config)
    return lora, handle or patch(lora, Ablate(direction))


# --- training


def gradients(model, tokens):
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: None if g is None else g.clone() for n, g in trained.items()}


def checkpointed(model, reentrant):
    model.train()
    if reentrant is not None:
        settings = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def assert_same_gradients(got, want):
    assert list(got) == list(want)
    for name, gradient in want.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_training_every_weight(model, direction, tokens, reentrant):
    model.requires_grad_(True)
    with hooks(model, direction):
        want = gradients(model, tokens)
    with patch(model, Ablate(direction)):
        checkpointed(model, reentrant)
        assert_same_gradients(gradients(model, tokens), want)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_training_lora(model, direction, tokens, reentrant, first):
    lora, handle = adapted(model, direction, first)
    assert handle.report().claimed == SITES
    lora.enable_input_require_grads()
    checkpointed(lora, reentrant)
    got = gradients(lora, tokens)
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.5)
    optimizer.step()
    trained = lora(tokens).logits
    handle.remove()
    optimizer.param_groups[0]["lr"] = -0.5  # back
    optimizer.step()
    with hooks(model, direction):
        assert_same_gradients(gradients(lora, tokens), got)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        close(trained, lora(tokens).logits, atol=1e-4)


@pytest.mark.parametrize("first", ["patch", "peft"])
@torch.no_grad()
def test_merging_and_unmerging_an_adapter(model, direction, tokens, first):
    lora, handle = adapted(model, direction, first)
    got = [lora(tokens).logits]
    lora.merge_adapter()
    got.append(lora(tokens).logits)
    lora.unmerge_adapter()
    got.append(lora(tokens).logits)
    with lora.disable_adapter():
        base = lora(tokens).logits
    handle.remove()
    want = wanted(model, direction, tokens)
    for logits in got:
        close(logits, want)
    with lora.disable_adapter():
        close(base, wanted(model, direction, tokens))
    assert not torch.allclose(base, want, atol=1e-2)


# --- spread out, offloaded, quantized


def offload(model, how, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.layers.0", "lm_head")}
    places |= {name: "disk" for name in ("model.layers.1", "model.layers.2", "model.norm")}
    places["model.rotary_emb"] = "cpu"
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("last", ["accelerate", "patch"])
@pytest.mark.parametrize("first", ["accelerate", "patch"])
@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_accelerate(model, direction, tokens, how, first, last, tmp_path):
    never = copy.deepcopy(model)
    before = state(model)
    plain, want = model(tokens).logits, wanted(model, direction, tokens)
    handle = patch(model, Ablate(direction)) if first == "patch" else None
    for m in (never, model):
        offload(m, how, tmp_path / str(id(m)))
    assert any(p.is_meta for p in model.parameters())
    handle = handle or patch(model, Ablate(direction))
    for grad in MODES:
        with grad():
            close(model(tokens).logits, want)
    handle.strength = 0.0
    close(model(tokens).logits, plain)
    handle.strength = 1.0
    if last == "patch":
        remove_hook_from_module(model, recurse=True)
        close(model(tokens).logits, want)
        handle.remove()
    else:
        handle.remove()
        assert torch.equal(model(tokens).logits, plain)
        remove_hook_from_module(model, recurse=True)
    remove_hook_from_module(never, recurse=True)
    assert torch.equal(model(tokens).logits, plain) and same_state(state(model), before)
    for (name, *got), (_, *would) in zip(traces(model), traces(never), strict=True):
        assert got == would, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", ["patch", "quantize"])
@pytest.mark.parametrize("how", ["dynamic", pytest.param("torchao", marks=pytest.mark.full)])
@torch.no_grad()
def test_quantized_linears(model, direction, tokens, how, first):
    def quantized(model):
        if how == "dynamic":
            return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        return model

    other = quantized(copy.deepcopy(model))
    want = wanted(other, direction, tokens)
    if first == "quantize":
        model = quantized(model)
    patch(model, Ablate(direction))
    if first == "patch":
        model = quantized(model)
    close(model(tokens).logits, want)
    assert not torch.allclose(want, other(tokens).logits, atol=0.1)
    unpatch(model)
    assert torch.equal(model(tokens).logits, other(tokens).logits)


@pytest.fixture
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fully_sharded(model, direction, tokens, one_rank, first):
    """FSDP swaps the classes of layers too; its weights are whole only inside their own layer."""
    plain, want = model(tokens).logits, wanted(model, direction, tokens)
    handle = patch(model, Ablate(direction)) if first == "patch" else None
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=one_rank)
    handle = handle or patch(model, Ablate(direction))
    for grad in MODES:
        with grad():
            close(model(tokens).logits, want)
    handle.remove()
    assert torch.equal(model(tokens).logits, plain)
    for layer in model.model.layers:
        assert type(layer).__name__ == "FSDPLlamaDecoderLayer" and "rk_sites" not in dir(layer)
        assert "teered" not in "".join(c.__name__ for c in type(layer).__mro__)


RANK = """
import sys, torch
import torch.distributed
from transformers import AutoModelForCausalLM
import refusal_kernels as rk
torch.set_num_threads(1)
folder = sys.argv[1]
given = torch.load(f"{folder}/given.pt")
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
assert model.model.layers[0].mlp.down_proj.weight.to_local().shape[1] == 48  # a half
out = {}
with rk.patch(model, rk.Ablate(rk.Direction(given["vector"]))) as handle:
    assert handle.report().claimed == 7
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            out[grad.__name__] = model(given["tokens"]).logits.detach().clone()
    out["generated"] = model.generate(given["tokens"], **given["settings"])
out["plain"] = model(given["tokens"]).logits.detach()
torch.save(out, f"{folder}/rank{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.full
def test_tensor_parallel_on_two_ranks(model, direction, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    given = {"vector": direction.vector, "tokens": tokens, "settings": GREEDY}
    torch.save(given, tmp_path / "given.pt")
    (tmp_path / "rank.py").write_text(RANK)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, tmp_path / "rank.py", tmp_path], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with patch(model, Ablate(direction)):
        want = dict.fromkeys([g.__name__ for g in MODES], model(tokens).logits)
        want["generated"] = model.generate(tokens, **GREEDY)
    want["plain"] = model(tokens).logits
    for rank in range(2):
        out = torch.load(tmp_path / f"rank{rank}.pt")
        assert list(out) == list(want)
        for name, value in want.items():
            close(out[name], value, msg=f"{name} of rank {rank}")


# --- copies and files


def test_a_deep_copy_is_steered_and_its_own(model, direction, tokens):
    plain, want = model(tokens).logits, wanted(model, direction, tokens)
    before, values = traces(model), state(model)
    with patch(model, Ablate(direction)) as handle:
        twin = copy.deepcopy(model)
        pair, dial = copy.deepcopy((model, handle))
        handle.strength = 0.0
        close(model(tokens).logits, plain)
    with torch.no_grad():
        close(twin(tokens).logits, want)  # norms linked
    assert dial.strength == (1.0,)
    dial.strength = 0.0
    close(pair(tokens).logits, plain)
    close(twin(tokens).logits, want)
    with pytest.raises(InputError, match="already"):
        patch(twin, Ablate(direction))
    unpatch(twin)
    dial.remove()
    for other in (twin, pair):
        assert traces(other) == before and same_state(state(other), values)
        assert torch.equal(other(tokens).logits, plain)


def test_a_saved_model_is_steered_in_another_process(model, direction, tokens, tmp_path):
    want = wanted(model, direction, tokens)
    with patch(model, Ablate(direction)) as handle:
        torch.save({"model": model, "handle": handle, "tokens": tokens}, tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "run = torch.no_grad()(lambda: saved['model'](saved['tokens']).logits)\n"
        "steered = run(); saved['handle'].remove()\n"
        "torch.save([steered, run(), saved['model']], sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], check=True, timeout=240)
    steered, plain, back = torch.load(tmp_path / "model.pt", weights_only=False)
    close(steered, want)
    close(plain, model(tokens).logits)
    assert traces(back) == traces(model) and same_state(state(back), state(model))


def test_save_pretrained_writes_the_plain_checkpoint(model, direction, tokens, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    with patch(model, Ablate(direction)):
        model.save_pretrained(tmp_path / "patched")
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes(), file.name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# --- the way back


def test_nothing_is_left_behind(model, direction, tokens):
    plain, before, values = model(tokens).logits, traces(model), state(model)
    last = Ablate(direction, positions="last")
    for made in (Ablate(direction), Add(direction, block_input=1), last):
        with patch(model, made) as handle:
            for grad in MODES:
                with grad():
                    model(tokens)
            assert same_state(state(model), values)
        assert traces(model) == before and same_state(state(model), values)
        assert torch.equal(model(tokens).logits, plain)
        handle.strength, handle.keep_scores = 0.3, True
        with handle.watch(lambda *_: None), handle.route([0, None]):
            assert torch.equal(model(tokens).logits, plain)
        assert handle.report().claimed == 0 and str(handle.report()).startswith("0 of")
        with pytest.raises(InputError, match="no scores"):
            handle.scores()
        again = patch(model, made)
        handle.remove()  # an old handle does not undo a new patch
        assert again.report().claimed == again.report().expected > 0
        again.remove()
        assert traces(model) == before


def test_a_patch_made_in_inference_mode(model, direction, tokens):
    want = wanted(model, direction, tokens)
    with torch.inference_mode():
        along = Direction(direction.vector.clone())
        handle = patch(model, Ablate(along, 0.0))
    handle.strength = 1.0
    close(model(tokens).logits, want)
    model.requires_grad_(True)
    model(tokens).logits.sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    handle.remove()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
