"""What a patch refuses, and that the model is as it was then."""

import pytest
import torch
from steering import is_plain, streams
from tiny import plain_hooks

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.interventions import Ablate, Add, Clamp
from refusal_kernels.patching.patch import patch
from refusal_kernels.patching.rewrite import steered


@pytest.mark.parametrize(
    ("interventions", "words"),
    [
        (lambda d: (), "got nothing"),
        (lambda d: (d,), "got Direction"),
        (lambda d: (Ablate(Direction(torch.ones(32))),), "hidden size 32; the model has 64"),
        (lambda d: (Add(d, block_input=3),), "block 3 is not there; the model has 3"),
        (lambda d: (Add(d, block_input=-1),), "block_input is -1"),
        (lambda d: (Ablate(d, float("nan")),), "strength is nan"),
        (lambda d: (Add(d, float("inf"), sites="all"),), "coefficient is inf"),
        (lambda d: (Clamp(d, low=1.0, high=0.0),), "above"),
        (lambda d: (Ablate(d), Ablate(Direction(d.vector + 0.1))), "orthonormal"),
    ],
)
def test_bad_input_leaves_the_model_alone(model, direction, interventions, words):
    with pytest.raises(InputError, match=words) as caught:
        patch(model, *interventions(direction))
    assert "\n" not in str(caught.value)
    assert is_plain(model)


def test_a_model_without_a_residual_stream_is_refused_by_name():
    from transformers import BertConfig, BertLMHeadModel, ReformerConfig, ReformerModelWithLMHead

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    bert = BertLMHeadModel(BertConfig(**small, intermediate_size=64, is_decoder=True))
    with pytest.raises(InputError, match=r"BertLayer\.forward adds nothing to the stream"):
        patch(bert, Ablate(Direction(torch.ones(64))))
    axial = {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 48]}
    config = ReformerConfig(**small, **axial, is_decoder=True, attn_layers=["local", "local"])
    reformer = ReformerModelWithLMHead(config)
    with pytest.raises(InputError, match=r"ReformerLayer has no residual stream: two reversible"):
        patch(reformer, Ablate(Direction(torch.ones(64))))
    assert is_plain(bert) and is_plain(reformer)
    with pytest.raises(InputError, match="Linear holds no list of decoder layers"):
        patch(torch.nn.Linear(2, 2), Ablate(Direction(torch.ones(64))))


def test_a_layer_whose_output_is_no_sum_is_refused(model):
    class PostNorm(type(model.model.layers[0])):
        def forward(self, hidden_states, **kwargs):
            residual = hidden_states
            hidden_states = residual + self.mlp(hidden_states)
            return self.input_layernorm(hidden_states)

    with pytest.raises(InputError, match=r"PostNorm\.forward returns no sum: the norm follows"):
        steered(PostNorm)


def test_of_a_block_that_can_not_be_read_the_input_is_steered(model, direction, tokens):
    """It has no source of its own to rewrite; a hook on what passes between blocks is exact."""

    class Around(type(model.model.layers[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    for layer in model.model.layers:
        layer.__class__ = Around
    plain = model(tokens).logits
    for everywhere in (Ablate(direction), Ablate(direction, sites=["mlp"], layers=[1])):
        with pytest.raises(InputError, match=r"Around.forward is .*; only the inputs of blocks"):
            patch(model, everywhere)
    assert is_plain(model)
    with plain_hooks(model, add=0.7 * direction.vector, layer=2):
        want = model(tokens).logits
    with pytest.raises(InputError, match=r"layers\.1 of LlamaForCausalLM can only be .* hook"):
        patch(model, Add(direction, coefficient=0.7, block_input=2), fused=True)
    assert is_plain(model)
    with patch(model, Add(direction, coefficient=0.7, block_input=2)) as handle:
        (site,) = handle.report().sites
        assert (site.name, site.path) == ("layers.1", "hook")
        assert torch.allclose(model(tokens).logits, want, atol=1e-5)
    _, seen = streams(model, tokens, Ablate(direction, sites=["block_input"]))
    assert list(seen) == ["embed", "layers.0", "layers.1"]
    assert all((h @ direction.unit).abs().max() < 1e-5 for h in seen.values())
    assert torch.equal(model(tokens).logits, plain)
