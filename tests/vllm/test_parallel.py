"""Several ranks: the tokens are those of one, and of Hugging Face."""

import pytest
from families import FAMILIES, make
from test_families import compare, expected, programs_for

ONE, TENSOR, PIPELINE, BOTH = (1, 1), (2, 1), (1, 2), (2, 2)
wanted = {}  # what Hugging Face says, by family: it takes as long as an engine


def compare_on(split, eager, family, folder, directions, steering, engines):
    programs = programs_for(family)
    if family not in wanted:
        path = make(family, folder)
        wanted[family] = path, expected(path, directions, programs)
    path, texts = wanted[family]
    tensor, pipeline = split
    ranks = {"distributed_executor_backend": "mp"} if tensor * pipeline > 1 else {}
    llm = engines(
        path,
        steering(programs=programs),
        enforce_eager=eager,
        max_num_seqs=32,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        **ranks,
    )
    compare(llm, texts)


@pytest.mark.parametrize(
    ("family", "split", "eager"),
    [
        ("llama", TENSOR, True),
        ("llama", PIPELINE, True),
        ("gemma2", TENSOR, False),
        ("gpt2", PIPELINE, False),
        ("llama", BOTH, False),
    ],
)
def test_several_ranks(family, split, eager, folder, directions, steering, engines):
    compare_on(split, eager, family, folder, directions, steering, engines)


@pytest.mark.full
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "split", [ONE, TENSOR, PIPELINE, BOTH], ids=["one", "tensor", "pipeline", "both"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_split(family, split, eager, folder, directions, steering, engines):
    compare_on(split, eager, family, folder, directions, steering, engines)
