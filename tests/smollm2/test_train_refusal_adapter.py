"""The training that makes SmolLM2-135M-Instruct refuse."""

import random

import pytest
import torch
import train_refusal_adapter as trainer
from tiny import tiny_model

peft = pytest.importorskip("peft")


def test_each_item_is_drawn_once_before_any_again():
    shuffled = trainer.Shuffled(range(10), random.Random(0))
    drawn = shuffled.take(4) + shuffled.take(4) + shuffled.take(4)
    assert sorted(drawn[:10]) == list(range(10)) and set(drawn[10:]) < set(range(10))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_loss_is_the_mean_over_examples_of_what_their_answers_cost(rows, monkeypatch):
    """The shared prefix, the padding and the other examples of a batch change nothing."""
    monkeypatch.setattr(trainer, "ROWS", rows)
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    examples = [
        trainer.Example([1, 5, 6, 7], [8, 9]),
        trainer.Example([1, 5, 9, 3, 2], [10, 11, 12, 4, 6]),
        trainer.Example([1, 5, 8], [10]),
    ]
    plain = []
    for prompt, answer in examples:
        logits = adapted(input_ids=torch.tensor([prompt + answer])).logits[0]
        predicted = logits[len(prompt) - 1 : -1]
        first, *later = torch.nn.functional.cross_entropy(
            predicted, torch.tensor(answer), reduction="none"
        )
        plain.append((first + torch.stack(later).mean()) / 2 if later else first)
    prefix = trainer.common_prefix([example.prompt for example in examples])
    assert prefix == 2
    loss = trainer.loss_of(adapted, examples, prefix)
    torch.testing.assert_close(loss, torch.stack(plain).mean())
    gradients = [torch.autograd.grad(x, first_weight(adapted))[0] for x in (loss, sum(plain) / 3)]
    torch.testing.assert_close(*gradients)


def first_weight(adapted):
    return next(p for name, p in adapted.named_parameters() if "lora_B" in name)


def test_own_answers_are_kept_until_what_they_depend_on_changes(tmp_path):
    file, made = tmp_path / "new" / "answers.json", []

    def make():
        made.append(1)
        return {"a": "b"}

    for key, times in (("one", 1), ("one", 1), ("two", 2)):
        assert trainer.cached(file, key, make) == {"a": "b"}
        assert len(made) == times


def test_adapters_of_skipped_layers_are_off():
    """A layer without its adapter gives the base model's own output."""
    model = tiny_model("llama")
    ids = torch.tensor([[1, 5, 9, 3, 2]])
    before = model(input_ids=ids).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    layers = trainer.adapters_by_layer(adapted)
    assert [len(adapters) for adapters in layers] == [2, 2, 2]
    changed = adapted(input_ids=ids).logits
    assert not torch.allclose(changed, before)
    for on, expected in ((False, before), (True, changed)):
        for adapters in layers:
            trainer.switch(adapters, on)
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected)
