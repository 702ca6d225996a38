"""The profiles of the benchmark: which cells, layers and prompts."""

import pytest
import torch

from refusal_kernels.bench import grid, run, shapes
from refusal_kernels.bench.settings import BenchSettings


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_on_a_processor_all_that_varies_does_so_one_at_a_time(profile):
    found = grid.grid_for(profile, "cpu", {})
    for name in found.models:
        config = shapes.config_of(name)
        layers = found.most_layers(config) if name in shapes.SHAPES else config.num_hidden_layers
        cells = found.cells(name, layers, config)
        assert len(set(cells)) == len(cells)
        first = cells[0]
        usual = [cell for cell in cells if others(cell, first) == []]
        assert len(usual) == len(found.phases) * len(found.batch)
        for cell in set(cells) - set(usual):
            (axis,) = others(cell, first)
            assert cell.work == "decode"
            rows = axis in ("steered", "programs")
            assert cell.batch == (max if rows else min)(found.batch)
        if name in shapes.SHAPES and shapes.layer_weights(config) > (found.vary_weights or 1e12):
            assert set(cells) == set(usual)
            continue
        for axis, values in grid.AXES.items():
            wanted = {v for v in getattr(found, values) if axis != "steered" or (v or 0) <= layers}
            assert {getattr(cell, axis) for cell in cells} == wanted


def others(cell, first):
    return [axis for axis in grid.AXES if getattr(cell, axis) != getattr(first, axis)]


def test_of_large_models_no_axis_varies_unless_it_is_named():
    def kinds(name, given):
        config = shapes.config_of(name).get_text_config(decoder=True)
        cells = grid.grid_for("full", "cpu", given).cells(name, 1, config)
        return len(cells), {(c.dtype, c.mode, c.programs) for c in cells}

    usual = {("float32", "eager", 1)}
    for name in ("llama-3.2-1b", "llama-3-8b", "qwen2.5-72b"):
        assert kinds(name, {}) == (4, usual)
        assert kinds(name, {"modes": ("compile",)}) == (4, {("float32", "compile", 1)})
    for name in ("toy", "qwen2.5-0.5b"):
        assert kinds(name, {})[1] > usual


def test_an_axis_that_is_named_is_crossed_with_the_rest():
    given = {"dtypes": ("float32", "bfloat16"), "modes": ("eager", "compile")}
    found = grid.grid_for("full", "cpu", given)
    kinds = {(c["dtype"], c["mode"], c["work"], c["batch"]) for c in found.combinations()}
    assert len(kinds) == 2 * 2 * len(found.phases) * len(found.batch)


def test_layers_and_prompts_are_cut_to_what_a_processor_can_do():
    found = grid.grid_for("full", "cpu", {})
    for name in shapes.SHAPES:
        config = shapes.config_of(name)
        weights, layers = shapes.layer_weights(config), found.most_layers(config)
        model = shapes.build(name, tiny(shapes.config_of(name)), "float32")
        assert shapes.layer_weights(model.config) == sum(
            module.weight.numel()
            for module in model.model.layers.modules()
            if isinstance(module, torch.nn.Linear)
        )
        assert layers == 1 or layers * weights <= found.shape_weights
        for batch in found.batch:
            tokens = batch * found.prompt_tokens(config, layers, batch)
            assert batch <= tokens <= found.prompt and tokens & (tokens - 1) == 0
            assert tokens * layers * weights <= found.prompt_work
            before = batch * found.context_tokens(config, layers, batch)
            assert before * layers * weights <= found.prompt_work
            assert before == 128 * batch or before * layers * weights > found.prompt_work / 2
    assert grid.grid_for("full", "cuda", {}).most_layers(config) is None


def tiny(config):
    config = shapes.cut(config, 1)
    config.hidden_size, config.intermediate_size, config.vocab_size = 256, 96, 32
    config.head_dim = 256 // config.num_attention_heads
    return config


def test_a_model_that_does_not_fit_in_one_dtype_is_measured_in_the_other(
    bench, monkeypatch, tmp_path
):
    fits = {"float32": 0, "bfloat16": 8}
    monkeypatch.setattr(shapes, "layers_that_fit", lambda config, dtype, room: fits[dtype])
    found = grid.grid_for("full", "cpu", {"models": ("toy",)})
    full = BenchSettings("full", found, (), "cpu", 1, tmp_path)
    cells = [cell for _, cells in run.Run(full)._plan() for cell in cells]
    by = {dtype: [cell for cell in cells if cell.dtype == dtype] for dtype in fits}
    assert len(by["float32"]) == 1 and len(by["bfloat16"]) > 6
    document = bench("--methods", "hooks", "--dtypes", "float32")[1]
    assert {row["status"] for row in document["rows"]} == {
        "not measured: one layer does not fit in memory"
    }
