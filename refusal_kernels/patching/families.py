"""What the rewriter may expect in a decoder layer: the exceptions and the rule are data here."""

# What each `residual + X` of a layer's forward adds, in the order of the source. A layer whose
# source holds another number of adds than this is refused: better no patch than half of one.
FAMILIES: dict[str, tuple[str, ...]] = {
    f"transformers.models.{family}.modeling_{family}.{layer}": ("attn", "mlp")
    for family, layer in (
        ("llama", "LlamaDecoderLayer"),
        ("mistral", "MistralDecoderLayer"),
        ("qwen2", "Qwen2DecoderLayer"),
        ("qwen3", "Qwen3DecoderLayer"),
    )
}
