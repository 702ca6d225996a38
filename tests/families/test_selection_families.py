"""Scores of many candidates together are those of each edit alone, in families of every kind."""

from typing import Any

import pytest
import tiny_families
import torch

import refusal_kernels as rk
from refusal_kernels.hf.forward import batch_logits, find_prefix
from refusal_kernels.hf.model import decoder_layers, hidden_size
from refusal_kernels.research.selection import measurement
from refusal_kernels.research.selection.measurement import Measurement, Question
from refusal_kernels.research.selection.plan import same_length
from refusal_kernels.research.selection.replay import Replay
from refusal_kernels.research.selection.scoring import kl_divergence, refusal_score

TOKENS = [5, 7]
# whether the layers can be run from the middle: not where they share a mask or a state by number,
# carry several streams, or begin the stream inside the block
FAMILIES = {
    **dict.fromkeys(["gpt2", "gpt_neox", "gemma2", "mixtral", "phi3"], True),
    **dict.fromkeys(["bamba", "deepseek_v4", "minimax"], False),
}
# whether keys and values are all that they keep of the tokens before
PREFIXED = {"gpt2", "gpt_neox", "gemma2", "mixtral", "phi3"}


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in tiny_families.MODEL_TYPES])
def test_together_as_alone(family: str, monkeypatch: Any) -> None:
    tried: list[Replay] = []

    class Seen(Replay):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            tried.append(self)

    monkeypatch.setattr(measurement, "Replay", Seen)
    model = tiny_families.build(family)
    generator = torch.Generator().manual_seed(0)
    highest = int(tiny_families.inputs(model)["input_ids"].max()) + 1
    harmful, harmless = (
        [torch.randint(3, highest, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((9, 7), (9, 9, 7))
    )
    shared = torch.randint(3, highest, (5,), generator=generator).tolist()
    harmful, harmless = ([shared + ids for ids in prompts] for prompts in (harmful, harmless))
    prefix = find_prefix(model, [*harmful, *harmless])
    assert (prefix is not None) == (family in PREFIXED)
    count = len(decoder_layers(model))
    directions = [
        rk.Direction(3 * torch.randn(hidden_size(model), generator=generator), layer=layer)
        for layer in range(1, count)
        for _ in range(2)
    ]
    batches = same_length([*harmful, *harmless], 8)
    plain = batch_logits(model, batches)
    question = Question(harmful, harmless, plain, TOKENS, 4, prefix)
    scores = Measurement(model, question, directions).run()
    for number, direction in enumerate(directions):
        with rk.patch(model, rk.Ablate(direction)):
            ablated = batch_logits(model, batches)
        with rk.patch(model, rk.Add(direction, block_input=direction.layer)):
            added = batch_logits(model, batches)
        for got, expected in (
            (scores.bypass, refusal_score(ablated[:2], TOKENS)),
            (scores.kl, kl_divergence(plain[2:], ablated[2:])),
            (scores.induce, refusal_score(added[2:], TOKENS)),
        ):
            torch.testing.assert_close(got[number], expected, rtol=0, atol=1e-4)
    assert [found.layers for found in tried] == [
        set(range(1, count)) if FAMILIES[family] else set()
    ]
    assert torch.equal(batch_logits(model, batches), plain)
