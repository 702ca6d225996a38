"""The route of every token, however the tokens of the requests are spread over batches."""

import random

import numpy as np
import pytest
import torch
from test_vllm_bank import bank

from refusal_kernels.vllm.programs import parse_program
from refusal_kernels.vllm.requests import Steering
from refusal_kernels.vllm.routing import Router

TOKENS, LENGTH = 16, 20


@pytest.fixture
def made(directions):
    """A bank with two programs."""
    made = bank(rows=4, tokens=TOKENS)
    for name in ("r", "t"):
        made.add(parse_program("p", {"ablate": name}, directions))
    return made


def route(router, batch, computed):
    """Route a batch of (request, tokens) pairs; return the row of every token."""
    counts = np.array([tokens for _, tokens in batch], dtype=np.int32)
    starts = np.array([computed[name] for name, _ in batch])
    positions = [computed[name] + k for name, tokens in batch for k in range(tokens)]
    padded = torch.tensor(positions + [0] * (TOKENS - len(positions)))
    router.route([name for name, _ in batch], counts, starts, padded)
    return router.bank.route.tolist(), positions


def test_tokens_take_the_row_of_their_request_and_padding_takes_none(made):
    router = Router(made, drafts=False)
    a, b = (Steering(version, 1.0) for version in made.versions)
    for name, steering in (("a", a), ("plain", None), ("b", b), ("again", a)):
        router.learn(name, steering)
    rows, _ = route(
        router,
        [("a", 2), ("plain", 3), ("b", 1), ("again", 1)],
        dict.fromkeys(("a", "plain", "b", "again"), 0),
    )
    first, second = made.rows_of([a, b])
    assert rows == [first] * 2 + [-1] * 3 + [second, first] + [-1] * (TOKENS - 7)
    assert route(router, [("plain", 2)], {"plain": 3})[0] == [-1] * TOKENS


@pytest.mark.parametrize("drafts", [False, True])
def test_a_token_is_steered_where_its_position_is_in_the_window(made, drafts):
    """Chunks, decoding, preemption, ends of requests: in any order."""
    generator = random.Random(0)
    router = Router(made, drafts)
    asked, computed, steered = {}, {}, 0
    for number in range(400):
        while len(asked) < 4:
            name = str(number + generator.random())
            end = generator.choice([None, generator.randint(1, LENGTH)])
            first = generator.choice([0, generator.randint(0, (end or LENGTH) - 1)])
            version = generator.choice([*made.versions, None])
            window = first, end, generator.random() < 0.5
            asked[name] = None if version is None else Steering(version, 1.0, *window)
            computed[name] = 0
            router.learn(name, asked[name])
        batch = []
        for name in generator.sample(list(asked), generator.randint(1, 4)):
            left = LENGTH - computed[name]
            batch.append((name, min(left, generator.choice([1, 1, 4]))))
        rows, positions = route(router, batch, computed)
        names = [name for name, tokens in batch for _ in range(tokens)]
        for row, name, position in zip(rows, names, positions, strict=False):
            steering = asked[name]
            inside = steering is not None and (
                steering.first <= position < (LENGTH if steering.end is None else steering.end)
            )
            assert row == (made.rows_of([steering])[0] if inside else -1)
            steered += inside
        assert rows[len(names) :] == [-1] * (TOKENS - len(names))
        for name, tokens in batch:
            computed[name] += tokens
            if computed[name] == LENGTH:
                router.forget(name)
                del asked[name]
            elif generator.random() < 0.1:  # preempted: it comes again from its start
                computed[name] = 0
    assert steered > 100


def test_a_request_that_comes_in_parts_keeps_its_first_steering(made):
    """What is cached of it is salted by the first."""
    router = Router(made, drafts=False)
    for version in made.versions:
        router.learn("a", Steering(version, 1.0))
    rows, _ = route(router, [("a", 2)], {"a": 0})
    assert rows[:2] == [*made.rows_of([Steering(made.versions[0], 1.0)])] * 2
    router.forget("a")
    router.learn("a", None)
    assert route(router, [("a", 2)], {"a": 0})[0][:2] == [-1, -1]


def test_a_batch_that_repeats_is_not_written_again(made, monkeypatch):
    router = Router(made, drafts=False)
    a = made.versions[0]
    router.learn("a", Steering(a, 1.0, 3, 6))
    router.learn("b", Steering(a, 0.5))
    written = []
    monkeypatch.setattr(made, "write_route", lambda rows: written.append(rows.tolist()))
    made.routed = True
    for position in range(8):
        route(router, [("a", 1), ("b", 1)], {"a": position, "b": position})
    inside, other = made.rows_of([Steering(a, 1.0), Steering(a, 0.5)])
    assert written == [[-1, other], [inside, other], [-1, other]]
