"""Programs that change while an engine runs."""

from types import SimpleNamespace

import pytest
import torch
from families import HIDDEN, make
from reference import TOKENS, greedy, hugging_face, prompts, served

import refusal_kernels as rk
from refusal_kernels import InputError
from refusal_kernels.vllm import set_programs
from refusal_kernels.vllm.names import VERSIONS
from refusal_kernels.vllm.worker_hooks import start


@pytest.mark.parametrize("eager", [pytest.param(True, marks=pytest.mark.full), False])
def test_programs_change_without_a_new_compilation(eager, folder, directions, steering, engines):
    from vllm.compilation.counter import compilation_counter

    path = make("llama", folder, num_hidden_layers=2)  # each layer is compiled
    model, prompt = hugging_face(path), prompts(1)[0]
    new = rk.Direction(torch.randn(HIDDEN, generator=torch.Generator().manual_seed(8)))
    harmful, harmless = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(9)) + 1.0
    means = rk.Means(harmful, harmless)
    centered = rk.Direction(harmful - harmless, means=means)
    wanted = {
        "r": greedy(model, prompt, TOKENS, (rk.Ablate(directions["r"]),)),
        "t": greedy(model, prompt, TOKENS, (rk.Ablate(directions["t"]),)),
        "new": greedy(model, prompt, TOKENS, (rk.Add(new, 3.0, block_input=1),)),
        "ace": greedy(model, prompt, TOKENS, (rk.Ace(centered, 0.5),)),
    }
    assert len({tuple(text) for text in wanted.values()}) == 4
    settings = steering(programs={"p": {"ablate": "r"}}, default="p")
    llm = engines(path, settings, enforce_eager=eager)
    before = compilation_counter.clone()

    def says(program=None):
        return served(llm, [(prompt, program)])[0]

    assert says() == says("p") == wanted["r"]
    set_programs(llm, {"p": {"ablate": "t"}, "q": {"ablate": "r"}})
    assert (says(), says("p"), says("q")) == (wanted["t"], wanted["t"], wanted["r"])
    set_programs(
        llm, {"n": {"add": "n", "coefficient": 3.0, "block_input": 1}, "q": None}, {"n": new}
    )
    assert says("n") == wanted["new"]
    set_programs(llm, {"c": {"ace": "c", "alpha": 0.5}}, {"c": centered})
    assert says("c") == wanted["ace"]  # its means have come along
    config = llm.llm_engine.vllm_config  # a worker that reads other files refuses to start
    config.additional_config["refusal_kernels"][VERSIONS] = {"p": "of another file"}
    with pytest.raises(InputError, match="files of the programs changed"):
        start(SimpleNamespace(vllm_config=config))
    with pytest.raises(ValueError, match="no program 'q'"):
        says("q")
    assert compilation_counter.num_graphs_seen == before.num_graphs_seen
    for programs, extra, words in (
        ({"p": None}, {}, "is the default"),
        ({"x": None}, {}, "no program 'x' to remove"),
        ({"x": {"ablate": "x"}}, {}, "no direction 'x'"),
        ({"x": [{"ablate": "r"}, {"ablate": "t"}]}, {}, "slots 1"),
        ({"x": {"ablate": "r", "block_input": 9}}, {}, "no place of the model"),
        ({"x": {"ablate": "o"}}, {"o": rk.Direction(torch.ones(3))}, "hidden size 3"),
    ):
        with pytest.raises(InputError, match=words):
            set_programs(llm, programs, extra)
    assert (says(), says("n")) == (wanted["t"], wanted["new"])


def test_a_running_request_keeps_its_program(folder, directions, steering, engines):
    path = make("llama", folder)
    prompt = prompts(1)[0]
    wanted = greedy(hugging_face(path), prompt, 24, (rk.Ablate(directions["r"]),))
    llm = engines(path, steering(programs={"p": {"ablate": "r"}}))
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, extra_args={"steer": "p"}
    )
    engine = llm.llm_engine
    engine.add_request("one", {"prompt_token_ids": prompt}, params)
    for _ in range(6):
        engine.step()
    set_programs(llm, {"p": {"ablate": "t"}})
    while engine.has_unfinished_requests():
        outputs = engine.step()
    assert list(outputs[0].outputs[0].token_ids) == wanted
