"""A family from elsewhere: its exceptions are one record that a user registers."""

import importlib
import sys

import pytest
import torch
from tiny import tiny_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import refusal_kernels as rk


class AddingMLP(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, hidden_states):
        return hidden_states + self.mlp(self.norm(hidden_states))


class OddDecoderLayer(LlamaDecoderLayer):
    """The second add is in a submodule."""

    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        return self.inner(hidden_states)


def test_a_registered_family_is_steered_in_its_adds():
    plain, odd, tokens = tiny_model(), tiny_model(), torch.randint(7, 30, (2, 9))
    for layer in odd.model.layers:
        layer.inner = AddingMLP(layer.post_attention_layernorm, layer.mlp)
        layer.__class__ = OddDecoderLayer
    assert torch.equal(odd(tokens).logits, plain(tokens).logits)
    ablate = rk.Ablate(rk.Direction(torch.randn(64)))
    with pytest.raises(rk.InputError, match=r"OddDecoderLayer.forward returns no sum"):
        rk.patch(odd, ablate)

    adders = (("", None, "attn"), ("inner", None, "mlp"))
    family = rk.Family(("OddDecoderLayer",), adders=adders)
    rk.register_family(family)
    rk.register_family(family)  # the same again changes nothing
    with pytest.raises(rk.InputError, match="OddDecoderLayer belongs to another family already"):
        rk.register_family(rk.Family(("OddDecoderLayer",), start="inner"))
    for wrong, why in (
        (rk.Family(()), "names no class"),
        (rk.Family("OddDecoderLayer"), r"classes of a family is 'Odd.*expected tuple"),
        (rk.Family(("X",), stream_names=["s"]), r"stream_names of a family is \['s'\]"),
        (rk.Family(("X",), adders=(("", None, "mixer"),)), "writer is 'mixer'"),
        (rk.Family(("X",), adders=(("", "attn"),)), r"adders of a family holds .*expected 3 items"),
        (rk.Family(("X",), adders, (("inner", "mlp"),)), "has adders and hooked"),
        (rk.Family(("X",), adders=(("j", "c", "attn"), ("j", "c", "mlp"))), "each submodule once"),
    ):
        with pytest.raises(rk.InputError, match=why):
            rk.register_family(wrong)
    lost = rk.Family(("OddDecoderLayer",), adders=(("outer", None, "mlp"),))
    rk.register_family(lost, replace=True)
    with pytest.raises(rk.InputError, match=r"OddDecoderLayer has no submodule 'outer'"):
        rk.patch(odd, ablate)
    rk.register_family(family, replace=True)
    with rk.patch(plain, ablate, fuse_norms=False), torch.no_grad():
        want = plain(tokens).logits
    with rk.patch(odd, ablate, fuse_norms=False, fused=True) as handle, torch.no_grad():
        assert handle.report().claimed == 7
        assert torch.equal(odd(tokens).logits, want)


@pytest.mark.parametrize("line", [
    "hidden_states.add_(written)",
    "hidden_states[:] = hidden_states + written",
    "hidden_states[:] += written",
    "torch.add(hidden_states, written, out=hidden_states)",
])  # fmt: skip
def test_a_block_that_writes_into_the_stream_is_refused(line, tmp_path, monkeypatch):
    (tmp_path / "in_place.py").write_text(
        "import torch\n"
        "from transformers.models.llama.modeling_llama import LlamaDecoderLayer\n"
        "class InPlaceLayer(LlamaDecoderLayer):\n"
        "    def forward(self, hidden_states, **kwargs):\n"
        "        written, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)\n"
        "        hidden_states = hidden_states + written\n"
        "        written = self.mlp(self.post_attention_layernorm(hidden_states))\n"
        f"        {line}\n"
        "        return hidden_states\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "in_place", raising=False)
    layer = importlib.import_module("in_place").InPlaceLayer
    model = tiny_model()
    for block in model.model.layers:
        block.__class__ = layer
    with pytest.raises(rk.InputError, match=r"InPlaceLayer\.forward writes into the stream in pla"):
        rk.patch(model, rk.Ablate(rk.Direction(torch.randn(64))))


def test_unpatch_undoes_what_has_no_handle():
    model, tokens = tiny_model(), torch.randint(7, 30, (2, 9))
    before = model(tokens).logits
    rk.patch(model, rk.Ablate(rk.Direction(torch.randn(64))))
    with pytest.raises(rk.InputError, match=r"patched already.*rk\.unpatch\(model\)"):
        rk.patch(model, rk.Ablate(rk.Direction(torch.randn(64))))
    rk.unpatch(model)
    assert torch.equal(model(tokens).logits, before)
    assert type(model.model.layers[0]) is LlamaDecoderLayer
