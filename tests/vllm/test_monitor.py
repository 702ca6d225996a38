"""The monitor counts what the Hugging Face model shows, of requests alone."""

import pytest
import torch
from families import make
from reference import hugging_face, prompts, served

import refusal_kernels as rk
from refusal_kernels import InputError
from refusal_kernels.vllm import read_monitor
from refusal_kernels.vllm.config import Monitor
from refusal_kernels.vllm.metrics import NAME, Snapshot
from refusal_kernels.vllm.monitor import edges

LAYER, TOKENS = 2, 8


def expected(model, texts, direction, interventions=()):
    """Shares at the input of block 2 of all tokens that the engine reads."""
    shares = []

    def seen(name, h):
        if name == f"layers.{LAYER - 1}.mlp":
            rows = h.reshape(-1, h.shape[-1])
            shares.append((rows @ direction.unit) / rows.norm(dim=-1))

    # only steered places are seen: strength 0 steers them all, and changes nothing
    interventions = (*interventions, rk.Ablate(direction, 0.0))
    for text in texts:
        with rk.patch(model, *interventions) as handle, handle.watch(seen), torch.no_grad():
            model(torch.tensor([text]))
    return torch.cat(shares)


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_histogram_counts_the_requests(eager, folder, directions, steering, engines):
    path, asked = make("llama", folder), prompts(6, seed=31)
    model = hugging_face(path)
    settings = steering(
        programs={"away": {"add": "r", "coefficient": -2.0, "block_input": 1}},
        monitor={"direction": "r", "block_input": LAYER},
    )
    # dummy tokens were many before the first request: warm-up, compilation, the start-up check
    llm = engines(path, settings, enforce_eager=eager, enable_prefix_caching=False)
    assert sum(read_monitor(llm)["counts"]) == 0
    total = torch.zeros(len(edges()), dtype=torch.int64)
    shares = []
    for name, interventions in (
        ("none", ()),
        ("away", (rk.Add(directions["r"], -2.0, block_input=1),)),
    ):
        answers = served(llm, [(prompt, name) for prompt in asked], TOKENS)
        # the last token that is generated is never read
        texts = [p + answer[:-1] for p, answer in zip(asked, answers, strict=True)]
        shares.append(expected(model, texts, directions["r"], interventions))
        total += torch.histc(shares[-1], bins=len(edges()), min=-1, max=1).long()
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    runner.refusal_kernels_state.count()  # a forward of no request's tokens
    histogram = read_monitor(llm)
    assert sum(histogram["counts"]) == sum(map(len, shares))
    # a share at an edge may fall on either side
    assert (torch.tensor(histogram["counts"]) - total).abs().sum() <= 4
    assert histogram["sum"] == pytest.approx(float(torch.cat(shares).double().sum()), abs=1e-3)
    assert shares[1].mean() < shares[0].mean() - 0.05


def test_prometheus_reads_it():
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    histogram = {"edges": [-0.5, 1.0], "counts": [3, 2], "sum": -0.5}
    text = generate_latest(Snapshot(histogram, Monitor('a "quoted" name', 4))).decode()
    (family,) = text_string_to_metric_families(text)
    samples = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert samples[f"{NAME}_bucket", "-0.5"] == 3 and samples[f"{NAME}_bucket", "1.0"] == 5
    assert samples[f"{NAME}_bucket", "+Inf"] == samples[f"{NAME}_count", None] == 5
    assert samples[f"{NAME}_sum", None] == -0.5
    assert family.samples[0].labels["direction"] == 'a "quoted" name'


def test_a_block_that_is_not_there(folder, steering, engines, monkeypatch):
    path = make("llama", folder)
    monkeypatch.setattr("vllm.v1.worker.worker_base.WorkerBase.__init__", None)  # nothing is loaded
    with pytest.raises(InputError, match="block_input is 4; the model has 4 blocks"):
        engines(path, steering(monitor={"direction": "r", "block_input": 4}))
