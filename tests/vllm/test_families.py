"""Every family says, token by token, what the patched Hugging Face model says."""

import pytest
from families import FAMILIES, greedy, hugging_face, make, prompts, served
from vllm.config import VllmConfig, set_current_vllm_config

import refusal_kernels as rk

PROGRAMS = {
    "ablate": {"ablate": "r"},
    "half": {"ablate": "r", "strength": 0.5},
    "add": {"add": "r", "coefficient": 2.0, "layer": 2},
    "clamp": {"clamp": "r", "high": 0.0},
    "two": [{"ablate": "r", "layers": [1, 2]}, {"set": "t", "value": 1.0, "sites": ["mlp"]}],
}


def interventions(directions):
    r, t = directions["r"], directions["t"]
    return {
        "ablate": (rk.Ablate(r),),
        "half": (rk.Ablate(r, 0.5),),
        "add": (rk.Add(r, 2.0, block_input=2),),
        "clamp": (rk.Clamp(r, high=0.0),),
        "two": (rk.Ablate(r, layers=(1, 2)), rk.Set(t, 1.0, sites=("mlp",))),
    }


def programs_for(family):
    """All, but those that ask for one of two writers that a family adds in one sum."""
    return {k: v for k, v in PROGRAMS.items() if (family, k) != ("neox", "two")}


def expected(path, directions, programs=PROGRAMS):
    """What Hugging Face says, by (program, strength), for each of the prompts."""
    # a vLLM engine leaves its mark on Hugging Face classes that it has served itself
    with set_current_vllm_config(VllmConfig()):
        model = hugging_face(path)
    edits = interventions(directions)
    cases = {(name, 1.0): (edits[name], 1.0) for name in programs}
    cases["none", 1.0] = ((), 1.0)
    cases["ablate", 0.7] = (edits["ablate"], 0.7)
    return {
        case: [greedy(model, prompt, 16, *program) for prompt in prompts()]
        for case, program in cases.items()
    }


def compare(llm, wanted):
    asked = [
        (prompt, {"program": name, "strength": strength})
        for name, strength in wanted
        for prompt in prompts()
    ]
    got = iter(served(llm, asked))
    for case, texts in wanted.items():
        assert [next(got) for _ in texts] == texts, case
    assert len({str(texts) for texts in wanted.values()}) >= 5  # the programs do differ


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_patched_hugging_face_model(
    family, folder, directions, steering, engines
):
    path, programs = make(family, folder), programs_for(family)
    wanted = expected(path, directions, programs)
    compare(engines(path, steering(programs=programs), max_num_seqs=32), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_compiled_too(family, folder, directions, steering, engines):
    path = make(family, folder)
    wanted = expected(path, directions)
    llm = engines(path, steering(programs=PROGRAMS), enforce_eager=False, max_num_seqs=32)
    compare(llm, wanted)
