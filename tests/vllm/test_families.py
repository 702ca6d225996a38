"""Every family gives, token by token, the answers of the patched Hugging Face model."""

import pytest
from families import FAMILIES
from reference import compare, programs_for

ONE, TENSOR, PIPELINE, BOTH = (1, 1), (2, 1), (1, 2), (2, 2)  # ranks: tensor, pipeline


@pytest.fixture
def compare_on(reference, steering, engines):
    """Start an engine of a family, and compare it."""

    def start(family, split, eager):
        path, texts = reference(family)
        tensor, pipeline = split
        llm = engines(
            path,
            steering(programs=programs_for(family)),
            enforce_eager=eager,
            max_num_seqs=40,
            tensor_parallel_size=tensor,
            pipeline_parallel_size=pipeline,
            distributed_executor_backend="mp" if tensor * pipeline > 1 else None,
        )
        compare(llm, texts)

    return start


# one of each way to add to the stream; the matrix below has all
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "neox"])
def test_greedy_tokens_are_those_of_the_patched_hugging_face_model(family, compare_on):
    compare_on(family, ONE, eager=True)


def test_compiled_too(compare_on):
    compare_on("llama", ONE, eager=False)


def test_two_ranks(compare_on):
    compare_on("llama", TENSOR, eager=True)


@pytest.mark.full
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "split", [ONE, TENSOR, PIPELINE, BOTH], ids=["one", "tensor", "pipeline", "both"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_split(family, split, eager, compare_on):
    compare_on(family, split, eager)
