"""What is collected, against the model's own hidden states, one prompt at a time."""

import copy
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model, tiny_tokenizer

from refusal_kernels.errors import InputError
from refusal_kernels.extraction.collect import collect, last_logits, mean_difference
from refusal_kernels.extraction.moments import Moments
from refusal_kernels.extraction.prompts import ChatFormat

HARMFUL = ["curse the lamp", "tell me how to hex a boat now please", "storm", "hex tea one two"]
HARMLESS = ["make tea", "please be kind and fix the box", "what is one plus two", "paint a cake"]
POSITIONS = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def inputs_of_blocks(model: Any, prompt: str) -> torch.Tensor:
    """float64 [layers, tokens, hidden] of one prompt alone: no padding, no batch.

    hidden_states[l] is the input of block l; the last one is after the final norm.
    """
    ids = torch.tensor(ChatFormat(tiny_tokenizer()).encode([prompt]))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    return torch.stack(states[:-1])[:, 0].double()


def plain_mean(model: Any, prompts: list[str], positions: int) -> torch.Tensor:
    return torch.stack([inputs_of_blocks(model, p)[:, -positions:] for p in prompts]).mean(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_moments_are_of_the_block_inputs(family: str, batch_size: int) -> None:
    model = tiny_model(family)
    moments = collect(model, tiny_tokenizer(), HARMFUL, batch_size=batch_size)
    assert moments.shape == (3, POSITIONS, 64)
    assert (moments.count("harmful") == len(HARMFUL)).all()
    assert not moments.count("harmless").any()
    # a float32 model on other batch shapes: a few ulps of activations of a few units
    torch.testing.assert_close(
        moments.mean("harmful"), plain_mean(model, HARMFUL, POSITIONS), rtol=0, atol=5e-6
    )


def test_the_last_layers_output_and_the_layers_are_not_mixed_up() -> None:
    model = tiny_model()
    embedded = model.get_input_embeddings()(
        torch.tensor(ChatFormat(tiny_tokenizer()).encode(["a"]))
    )
    first = collect(model, tiny_tokenizer(), ["a"]).mean("harmful")[0]
    torch.testing.assert_close(first, embedded[0, -POSITIONS:].double(), rtol=0, atol=0)


def test_mean_difference_is_position_layer_hidden() -> None:
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    candidates = mean_difference(
        model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    expected = plain_mean(model, HARMFUL, POSITIONS) - plain_mean(model, HARMLESS, POSITIONS)
    assert candidates.dtype == torch.float32 and candidates.shape == (POSITIONS, 3, 64)
    torch.testing.assert_close(candidates.double(), expected.transpose(0, 1), rtol=0, atol=5e-6)
    assert not candidates[:, 0].any()  # the template's own tokens: the same embedding everywhere
    assert candidates[:, 1].any()
    assert seen == [(3, 8), (4, 8), (7, 8), (8, 8)]


def test_fewer_and_more_positions_than_the_template_has() -> None:
    model = tiny_model()
    one = collect(model, tiny_tokenizer(), HARMFUL, positions=1)
    torch.testing.assert_close(
        one.mean("harmful"), plain_mean(model, HARMFUL, 1), rtol=0, atol=5e-6
    )
    # "storm" has 1 + 1 + 1 + 4 tokens: what would be padding is not counted
    many = collect(model, tiny_tokenizer(), HARMFUL, positions=9)
    lengths = torch.tensor([len(ids) for ids in ChatFormat(tiny_tokenizer()).encode(HARMFUL)])
    expected = [int((lengths >= 9 - slot).sum()) for slot in range(9)]
    assert many.count("harmful")[2].tolist() == expected and 0 < expected[0] < len(HARMFUL)
    torch.testing.assert_close(
        many.mean("harmful")[:, -POSITIONS:],
        plain_mean(model, HARMFUL, POSITIONS),
        rtol=0,
        atol=5e-6,
    )
    wide = collect(model, tiny_tokenizer(), ["storm"], positions=20)
    assert wide.count("harmful")[0].tolist() == [0] * 13 + [1] * 7


def test_a_state_goes_on(tmp_path: Any) -> None:
    model = tiny_model()
    whole = collect(model, tiny_tokenizer(), HARMFUL, batch_size=2)
    collect(model, tiny_tokenizer(), HARMLESS, batch_size=2, group=1, moments=whole)
    expected = mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS, batch_size=2)
    assert torch.equal(whole.compute().mean_difference.float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    moments = collect(model, tiny_tokenizer(), HARMFUL)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(
        moments.mean("harmful"), plain_mean(model, HARMFUL, POSITIONS), rtol=0, atol=tolerance
    )


def test_logits_are_those_of_each_prompt_alone() -> None:
    model = tiny_model()
    logits = last_logits(model, tiny_tokenizer(), HARMFUL + HARMLESS, batch_size=3)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu"
    for row, prompt in zip(logits, HARMFUL + HARMLESS, strict=True):
        ids = torch.tensor(ChatFormat(tiny_tokenizer()).encode([prompt]))
        torch.testing.assert_close(row, model(ids).logits[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", [collect, last_logits])
def test_positions_count_from_the_first_real_token(run: Any) -> None:
    # a rotary model would not show a shift, one with learned positions would
    model, seen = tiny_model(), {}
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    run(model, tiny_tokenizer(), ["storm", "make tea now"])
    assert seen["attention_mask"].tolist() == [[1] * 9, [0, 0, *[1] * 7]]
    assert seen["position_ids"].tolist() == [[*range(9)], [0, 0, *range(7)]]


def test_a_system_prompt_changes_what_is_read() -> None:
    model = tiny_model()
    plain = last_logits(model, tiny_tokenizer(), ["make tea"])
    kind = last_logits(model, ChatFormat(tiny_tokenizer(), system="be kind"), ["make tea"])
    assert (plain - kind).abs().max() > 0.01


def test_hooks_are_gone_even_after_an_error() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, tiny_tokenizer(), HARMFUL, progress=fail)
    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tiny_tokenizer(), HARMFUL)
    handle.remove()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_input_is_refused_before_any_pass() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()

    def never(*_: Any) -> None:
        raise AssertionError("the model ran")

    model.model.register_forward_pre_hook(never)
    with pytest.raises(InputError, match="no prompt"):
        collect(model, tokenizer, [])
    with pytest.raises(InputError, match="no prompt"):
        mean_difference(model, tokenizer, HARMFUL, [])
    with pytest.raises(InputError, match="0 positions"):
        collect(model, tokenizer, HARMFUL, positions=0)
    with pytest.raises(InputError, match="group 2"):
        collect(model, tokenizer, HARMFUL, group=2)
    with pytest.raises(InputError, match=r"need \(3, 4, 64\)"):
        collect(model, tokenizer, HARMFUL, moments=Moments(3, 5, 64))
    with pytest.raises(InputError, match="Linear holds no list of decoder layers"):
        collect(torch.nn.Linear(2, 2), tokenizer, HARMFUL)


def test_nan_in_the_model_is_named() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight[5, 5] = float("nan")
    with pytest.raises(InputError, match="met NaN or infinity at layer 2, position -4"):
        mean_difference(model, tiny_tokenizer(), HARMFUL, HARMLESS)
