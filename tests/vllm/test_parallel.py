"""Two ranks: the tokens are those of one."""

import pytest
from families import make
from test_families import PROGRAMS, compare, expected


@pytest.mark.parametrize(
    ("family", "split", "eager"),
    [
        ("llama", "tensor_parallel_size", True),
        ("llama", "pipeline_parallel_size", True),
        ("gemma2", "tensor_parallel_size", False),
        ("gpt2", "pipeline_parallel_size", False),
    ],
)
def test_two_ranks(family, split, eager, folder, directions, steering, engines):
    path = make(family, folder)
    wanted = expected(path, directions)
    llm = engines(
        path,
        steering(programs=PROGRAMS),
        enforce_eager=eager,
        max_num_seqs=32,
        distributed_executor_backend="mp",
        **{split: 2},
    )
    compare(llm, wanted)
