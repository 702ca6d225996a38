"""What is particular about families of models: the exceptions to the rules, one record a family.

The rules: the decoder's layers hold the adds in their own forward, the first parameter of that is
the stream, and what enters the first layer is what the embedding wrote. A family that follows them
needs no record.
"""

from dataclasses import dataclass, fields

from refusal_kernels.errors import InputError
from refusal_kernels.hf.model import TOKENS_FIRST

# Functions that add a residual themselves; `Site` has a method of each name.
ADDING_FUNCTIONS = ("dropout_add", "bias_dropout_add")

# Functions that return the stream after an add that cannot be taken apart: what they return is
# steered.
STREAM_FUNCTIONS = ("depth_scaled_residual_add",)

# Decorators that a rewritten forward keeps: they rename what older callers pass.
KEPT_DECORATORS = ("deprecate_kwarg",)

NEXT = "next:"  # before a submodule's path: that of the layer after

POST_NORM = (
    "the norm follows the add (post-norm), so what is passed on is the normed sum, into which the "
    "gain mixes the direction again"
)


@dataclass(frozen=True)
class Family:
    """The exceptions of one family of models.

    Attributes
    ----------
    classes
        The names of the classes of its decoder layers (or of a submodule that does the adding),
        without their module, so that copies (multimodal, quantized) share the record. A subclass
        under another name needs its own.
    adders
        Where the adds of a layer are if not (all) in its own forward, in order: (submodule, the
        parameter of its forward that is the stream or None for the first, what it writes: "attn"
        or "mlp"). "" is the layer itself. A submodule stands here once, however many adds its
        forward has. A place that is not named is not steered.
    hooked
        Submodules whose output is the stream, where no add can be rewritten: they do the adding
        with scales of their own, or the norm follows the add (post-norm), so that what is passed on
        is what the norm returns. Their outputs are steered by hooks, exactly but unfused:
        (submodule, what it adds). After "next:" a submodule of the layer after, and of the last
        layer its own output.
    restart
        Where some layers read a mix of earlier streams and start a new one: (the condition in the
        layer's code, the submodule whose output is the new stream, the kind of its place).
    start
        The submodule of the first layer whose output starts the stream, where that is not its
        input.
    not_stream_sums
        Sums with a stream in them that are not the stream, as source: what only a branch reads.
    stream_names
        Names that hold the stream wherever they are assigned: a submodule hands it back. Not one
        that holds something else elsewhere in the forward.
    stream_expressions
        Terms of a sum that are the stream though it went through a function, as source.
    tokens_first
        Whether the stream is [tokens, batch, hidden].
    no_stream
        Why there is no residual stream that one direction could be taken from; "" where there is.
    """

    classes: tuple[str, ...]
    adders: tuple[tuple[str, str | None, str], ...] = ()
    hooked: tuple[tuple[str, str], ...] = ()
    restart: tuple[str, str, str] | None = None
    start: str = ""
    not_stream_sums: frozenset[str] = frozenset()
    stream_names: frozenset[str] = frozenset()
    stream_expressions: frozenset[str] = frozenset()
    tokens_first: bool = False
    no_stream: str = ""


_BY_CLASS: dict[str, Family] = {}
_ORDINARY = Family(())


def register_family(*families: Family, replace: bool = False) -> None:
    """Make families known, so that `patch` steers their models by these records.

    Parameters
    ----------
    families
        The records.
    replace
        Whether a record may take the place of another one for the same class.

    Raises
    ------
    InputError
        If a class has another record already and ``replace`` is False, a record names no class, has
        both ``adders`` and ``hooked``, names a submodule twice, a field has another type than
        `Family` says, or a writer is neither "attn" nor "mlp".
    """
    for family in families:
        if not family.classes:
            raise InputError("a family names no class; expected those of its decoder layers")
        for field in fields(Family):
            value, kind = getattr(family, field.name), type(getattr(_ORDINARY, field.name))
            if not isinstance(value, (tuple, kind) if field.name == "restart" else kind):
                raise InputError(f"{field.name} of a family is {value!r}; expected {field.type}")
        if family.adders and family.hooked:
            raise InputError("a family has adders and hooked; all its places are one or the other")
        for name, size in (("adders", 3), ("hooked", 2)):
            for entry in getattr(family, name):
                if len(entry) != size:
                    raise InputError(f"{name} of a family holds {entry!r}; expected {size} items")
                if entry[-1] not in ("attn", "mlp"):
                    raise InputError(
                        f"a family's writer is {entry[-1]!r}; expected 'attn' or 'mlp'"
                    )
        if len({entry[:2] for entry in family.adders}) < len(family.adders):
            raise InputError(
                f"adders of a family are {family.adders!r}; expected each submodule once: its "
                "forward holds all of its adds"
            )
        for name in family.classes:
            if not replace and _BY_CLASS.get(name, family) != family:
                raise InputError(f"{name} belongs to another family already; replace=True replaces")
    _BY_CLASS.update({name: family for family in families for name in family.classes})
    TOKENS_FIRST.update(*(family.classes for family in families if family.tokens_first))


def family_of(cls: type) -> Family:
    """Return the record of a layer's class; an empty one where it follows the rules."""
    return _BY_CLASS.get(cls.__name__, _ORDINARY)


register_family(
    Family(("Block",), hooked=(("ln_1", "attn"), ("ln_2", "mlp"))),  # openai-gpt
    Family(
        ("BloomBlock",), adders=(("self_attention", "residual", "attn"), ("mlp", "residual", "mlp"))
    ),
    Family(("CpmAntTransformerBlock",), adders=(("self_att", None, "attn"), ("ffn", None, "mlp"))),
    Family(
        ("DbrxBlock",),
        adders=(("norm_attn_norm", None, "attn"), ("", None, "mlp")),
        stream_names=frozenset({"resid_states"}),
    ),
    Family(
        ("DeepseekV4DecoderLayer",),  # streams among themselves
        stream_expressions=frozenset(
            {"torch.matmul(comb.to(dtype).transpose(-1, -2), hidden_states)"}
        ),
    ),
    Family(
        ("DoryDecoderLayer",),  # norms without weights: they scale whole rows
        stream_expressions=frozenset(
            {"self.input_layernorm(hidden_states)", "self.pre_feedforward_layernorm(hidden_states)"}
        ),
    ),
    Family(
        ("Gemma3nTextDecoderLayer",),
        no_stream="AltUp keeps several streams and predicts each from the others",
    ),
    Family(("GitLayer",), hooked=(("attention.output", "attn"), ("output", "mlp"))),
    Family(
        ("HrmTextDecoderLayer",),
        no_stream="two recurrent states, summed between stacks that each end in a norm",
    ),
    Family(
        (
            "Inkling2FullDecoderLayer",
            "Inkling2SlidingDecoderLayer",
            "Inkling2LoopFullDecoderLayer",
            "Inkling2LoopFullLoopDecoderLayer",
            "Inkling2LoopSlidingDecoderLayer",
            "Inkling2LoopSlidingLoopDecoderLayer",
        ),
        restart=("self.is_block_boundary", "post_attention_convolution", "attn"),
    ),
    Family(
        ("MiniMaxDecoderLayer",),
        hooked=(("post_attention_layernorm", "attn"), (NEXT + "input_layernorm", "mlp")),
        start="input_layernorm",
    ),
    Family(("MptBlock",), adders=(("", None, "attn"), ("ffn", "residual", "mlp"))),
    Family(
        ("Qwen4ExpTextDecoderLayer",),  # several streams side by side
        stream_names=frozenset({"hyper_input"}),
    ),
    Family(
        ("ReformerLayer",),
        no_stream="two reversible streams, of which each is computed from the other",
    ),
    Family(("RwkvBlock",), start="pre_ln"),
    Family(
        ("XLNetLayer",),
        hooked=(("rel_attn.layer_norm", "attn"), ("ff.layer_norm", "mlp")),
    ),
    Family(("ZambaHybridLayer", "Zamba2HybridLayer"), adders=(("mamba_decoder", None, "attn"),)),
    Family(
        ("ZambaMambaDecoderLayer", "Zamba2MambaDecoderLayer"),
        not_stream_sums=frozenset({"hidden_states + transformer_hidden_states"}),
    ),
    Family(
        ("ZayaDecoderLayer",),
        hooked=(("post_attention_residual_scale", "attn"), ("post_mlp_residual_scale", "mlp")),
    ),
)
