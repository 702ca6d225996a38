"""The whole demo on the toy model: what must hold on the held-out test split, what it writes."""

import copy
import dataclasses
import json

import pytest
import torch
from tiny import full, run_command, tiny_model, tiny_tokenizer

from refusal_kernels import ops, toy
from refusal_kernels.direction import Direction
from refusal_kernels.hf.chat import ChatFormat
from refusal_kernels.hf.embedded import EMBEDDED, DemoSize
from refusal_kernels.hf.generate import generate
from refusal_kernels.interventions import Ablate
from refusal_kernels.patching.paper_hooks import paper_hooks
from refusal_kernels.patching.patch import patch
from refusal_kernels.research.demo import compare_speed


@pytest.fixture(scope="module", params=[40, full(None)], ids=["some", "whole"])
def out(request, tmp_path_factory):
    """A folder that the demo filled: with so many prompts of each class of the test split."""
    path = tmp_path_factory.mktemp("demo") / "made" / "here"
    chosen = dataclasses.replace(EMBEDDED["toy"], demo=DemoSize(test=request.param))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(EMBEDDED, "toy", chosen)
        assert run_command("demo", "--out", path, "--rounds", 3) == 0
    return path


@pytest.fixture(scope="module")
def report(out):
    return json.loads((out / "report.json").read_text())


def test_the_finding(report, request):
    harmful, harmless = (report["refusal_rate"][c] for c in ("harmful", "harmless"))
    assert harmful["unmodified"] >= 0.95
    assert harmful["ablated"] <= 0.05
    assert abs(harmful["orthogonalized"] - harmful["ablated"]) <= 0.02
    assert harmless["unmodified"] <= 0.02
    assert harmless["added"] >= 0.95
    whole = "whole" in request.node.callspec.id
    assert min(report["prompts"]["test"].values()) >= (200 if whole else 40)


def test_capability_is_kept(report):
    kept = report["capability"]
    assert set(kept) == {"unmodified", "ablated", "orthogonalized"}
    assert all(score > 0.9 for score in report["skills"]["unmodified"].values())
    assert len(report["skills"]["unmodified"]) >= 3
    assert kept["ablated"] >= 0.99 * kept["unmodified"]
    assert kept["orthogonalized"] >= 0.99 * kept["unmodified"]


def test_every_site_is_steered(report):
    model, _ = toy.load()
    expected = 1 + 2 * model.config.num_hidden_layers
    assert report["sites"] == {"claimed": expected, "expected": expected}
    assert 0 < report["residual"]["max_abs_score"] <= 4 * torch.finfo(torch.float32).eps


def test_report_has_the_rest(report):
    assert {"layer", "position", "bypass", "induce", "kl"} <= set(report["selection"])
    for name in ("hooks", "ablated", "orthogonalized"):
        speed = report["speed"][name]
        low, high = speed["quartiles"]
        assert 0 < low <= speed["median"] <= high and speed["rounds"] == 3
    assert report["device"] and report["versions"]["torch"] == torch.__version__
    assert all(e["holds"] for e in report["expectations"])


def test_files(out, report):
    import matplotlib.image

    names = {path.name for path in out.iterdir()}
    pictures = {f"{name}.png" for name in ("candidates", "projections", "refusals", "speed")}
    documents = {f"{name}.json" for name in ("report", "samples", "selection")}
    assert names == {"direction.safetensors"} | documents | pictures
    for name in pictures:
        pixels = matplotlib.image.imread(out / name)
        assert pixels.shape[1] > 500 and pixels[..., :3].std() > 0.05, "an empty picture"
    direction = Direction.load(out / "direction.safetensors")
    assert (direction.layer, direction.position) == tuple(
        report["selection"][k] for k in ("layer", "position")
    )
    samples = json.loads((out / "samples.json").read_text())
    assert {s["category"] for s in samples} == {"harmful", "harmless"}


def test_greedy_completions_equal_float64_hooks(out):
    model, tokenizer = toy.load()
    direction = Direction.load(out / "direction.safetensors")
    prompts = [*toy.prompts("harmful", "test")[:40], *toy.prompts("harmless", "test")[:40]]
    with patch(model, Ablate(direction)):
        fused = generate(model, tokenizer, prompts)
    with paper_hooks(model.double(), direction):
        hooks = generate(model, tokenizer, prompts)
    assert fused == hooks


def test_logits_equal_float64_hooks(out):
    model, tokenizer = toy.load()
    direction = Direction.load(out / "direction.safetensors")
    ids, mask = ChatFormat(tokenizer).batch(toy.prompts("harmful", "test")[:16])
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    exact = copy.deepcopy(model).double()
    with paper_hooks(exact, direction), torch.inference_mode():
        want = exact(ids, **inputs).logits[mask.bool()]
    with patch(model, Ablate(direction)), torch.inference_mode():
        got = model(ids, **inputs).logits[mask.bool()]
    error, scale = (got.double() - want).abs().max(), want.abs().max()
    assert error <= 40 * torch.finfo(torch.float32).eps * scale


def test_without_the_kernel_the_demo_fails(out, tmp_path, monkeypatch, capsys):
    """An add_steer that only adds: the run must end with exit code 1 and say what did not hold."""

    def plain_add(x, residual, bank, params, route=None):
        return x.clone() if residual is None else x + residual

    def plain_norm(x, residual, weight, eps, bank, params, route=None, weight_offset=0.0):
        h = plain_add(x, residual, bank, params)
        return ops.rms_norm(h, weight, eps, weight_offset), h

    broken = dict(ops.BACKENDS["cpu"].ops)
    for form in ("", "_inference"):
        broken |= {f"add_steer{form}": plain_add, f"add_steer_rms_norm{form}": plain_norm}
    backend = type(ops.BACKENDS["cpu"])("cpu", broken, ops.BACKENDS["cpu"].why_not)
    monkeypatch.setitem(ops.BACKENDS, "cpu", backend)
    # the ablation does nothing, which the certificate of the orthogonalized weights finds first
    assert run_command("demo", "--out", tmp_path / "broken", "--rounds", 2) in (1, 2)
    error = capsys.readouterr().err
    assert "the logits differ from those under ablation" in error or "not as expected" in error


def test_the_checkpoints_generation_settings_play_no_part_in_its_speed():
    model = tiny_model()
    model.generation_config.stop_strings = ["tea"]  # transformers then asks for a tokenizer
    compare_speed(
        model, copy.deepcopy(model), ChatFormat(tiny_tokenizer()), Direction(torch.randn(64)),
        ["make tea"], 2, lambda *_: None, new_tokens=2,
    )  # fmt: skip
    assert model.generation_config.stop_strings == ["tea"]
