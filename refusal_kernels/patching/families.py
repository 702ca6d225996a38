"""What is particular about families of models: the exceptions to the rules, as data.

The rules: the decoder's layers hold the adds in their own forward, the first parameter of that is
the stream, and what enters the first layer is what the embedding wrote. Classes are named without
their module, so that a family's copies (multimodal, quantized) share an entry.
"""

# Functions that add a residual themselves; `Site` has a method of each name.
ADDING_FUNCTIONS = ("dropout_add", "bias_dropout_add")

# Decorators that a rewritten forward keeps: they rename what older callers pass.
KEPT_DECORATORS = ("deprecate_kwarg",)

# Sums with a stream in them that are not the stream, by class: what only a branch reads.
NOT_STREAM_SUMS: dict[str, frozenset[str]] = {
    "ZambaMambaDecoderLayer": frozenset({"hidden_states + transformer_hidden_states"}),
    "Zamba2MambaDecoderLayer": frozenset({"hidden_states + transformer_hidden_states"}),
}

# Names that hold the stream wherever they are assigned: a submodule hands it back in a tuple.
STREAM_NAMES: dict[str, frozenset[str]] = {
    "DbrxBlock": frozenset({"resid_states"}),
    "Qwen4ExpTextDecoderLayer": frozenset({"hyper_input"}),  # several streams side by side
}

# Where the adds of a layer are if not (all) in its own forward, in order: (submodule, the parameter
# of its forward that is the stream, what it writes). "" is the layer itself.
ADDERS: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "BloomBlock": (("self_attention", "residual", "attn"), ("mlp", "residual", "mlp")),
    "CpmAntTransformerBlock": (("self_att", None, "attn"), ("ffn", None, "mlp")),
    "DbrxBlock": (("norm_attn_norm", None, "attn"), ("", None, "mlp")),
    "MptBlock": (("", None, "attn"), ("ffn", "residual", "mlp")),
    "ZambaHybridLayer": (("mamba_decoder", None, "attn"),),
    "Zamba2HybridLayer": (("mamba_decoder", None, "attn"),),
}

# Submodules whose output is the stream, where no add can be rewritten: they do the adding with
# scales of their own, or the norm follows the add (post-norm), so that what is passed on is what
# the norm returns. Their outputs are steered by hooks, exactly but unfused. (submodule, what it
# adds); NEXT: of the layer after, and of the last layer its own output.
NEXT = "next:"
HOOKED: dict[str, tuple[tuple[str, str], ...]] = {
    "Block": (("ln_1", "attn"), ("ln_2", "mlp")),  # openai-gpt
    "GitLayer": (("attention.output", "attn"), ("output", "mlp")),
    "MiniMaxDecoderLayer": (
        ("post_attention_layernorm", "attn"),
        (NEXT + "input_layernorm", "mlp"),
    ),
    "XLNetLayer": (("rel_attn.layer_norm", "attn"), ("ff.layer_norm", "mlp")),
    "ZayaDecoderLayer": (
        ("post_attention_residual_scale", "attn"),
        ("post_mlp_residual_scale", "mlp"),
    ),
}

# Layers of which some start a new stream, while what they read mixes the ones before, each scaled
# row by row: (the condition, the submodule whose output the new stream is, what it writes).
RESTARTS: dict[str, tuple[str, str, str]] = dict.fromkeys(
    (
        "Inkling2FullDecoderLayer",
        "Inkling2SlidingDecoderLayer",
        "Inkling2LoopFullDecoderLayer",
        "Inkling2LoopFullLoopDecoderLayer",
        "Inkling2LoopSlidingDecoderLayer",
        "Inkling2LoopSlidingLoopDecoderLayer",
    ),
    ("self.is_block_boundary", "post_attention_convolution", "attn"),
)

# The submodule of the first layer whose output starts the stream, where that is not its input.
STARTS: dict[str, str] = {"MiniMaxDecoderLayer": "input_layernorm", "RwkvBlock": "pre_ln"}

# Layers whose stream is [tokens, batch, hidden].
TOKENS_FIRST = frozenset({"XLNetLayer"})

# Functions that return the stream after an add that can not be taken apart: what they return is
# steered.
STREAM_FUNCTIONS = ("depth_scaled_residual_add",)

# Terms of a sum that are the stream though it went through a function, by class.
STREAM_EXPRESSIONS: dict[str, frozenset[str]] = {
    "DoryDecoderLayer": frozenset(  # norms without weights: they scale whole rows
        {"self.input_layernorm(hidden_states)", "self.pre_feedforward_layernorm(hidden_states)"}
    ),
    "DeepseekV4DecoderLayer": frozenset(
        {
            "torch.matmul(comb.to(dtype).transpose(-1, -2), hidden_states)"
        }  # streams among themselves
    ),
}

# Layers without a residual stream that one direction could be taken from, and why.
POST_NORM = (
    "the norm follows the add (post-norm), so what is passed on is the normed sum, into which the "
    "gain mixes the direction again"
)
NO_STREAM: dict[str, str] = {
    "Gemma3nTextDecoderLayer": "AltUp keeps several streams and predicts each from the others",
    "HrmTextDecoderLayer": "two recurrent states, summed between stacks that each end in a norm",
    "ReformerLayer": "two reversible streams, of which each is computed from the other",
}
