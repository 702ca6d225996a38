"""Patches a tiny random model of every family of causal language models, and says how that went.

    python tests/families/family_matrix.py [MODEL_TYPE ...] [--write]

Each model is held against `stream_reference`, which follows the stream by the identity of its
tensors and knows nothing of the patch, at three edits: ablation, ablation at strength 0.7 (which
shows a place that is steered twice or not at all) and addition. Generation with a cache must give
the logits of generation without. Then strength 0 without fused norms, and the model after the patch
is removed, must give the plain logits bit for bit, and nothing may be left on any module.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pages
import stream_reference
import tiny_families
import torch
import transformers
from torch import Tensor, nn

import refusal_kernels as rk
from refusal_kernels.hf.model import decoder_layers, hidden_size
from refusal_kernels.patching.norm_links import Link

FUSED, UNFUSED, REFUSED, FAILED = "fused", "unfused", "refused", "FAILED"
# float32, relative to the largest logit: models of four random layers amplify a rounding
TOLERANCE = 1e-4


@dataclass
class Finding:
    """How the patch of one family went.

    Attributes
    ----------
    verdict
        FUSED, UNFUSED (hooks), REFUSED or FAILED.
    places, norms
        How many places of the tiny model are steered, and how many of them with the norm after.
    note
        Why, where it is not FUSED.
    error, score
        Largest logit difference from the reference over the largest logit; largest |r.h| / |h|.
    """

    model_type: str
    kind: str
    verdict: str
    places: int = 0
    norms: int = 0
    note: str = ""
    error: float = 0.0
    score: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether the patch does what it must not."""
        return self.verdict == FAILED

    def numbers(self) -> str:
        """The two errors, for the terminal."""
        return f"{self.error:.1e} {self.score:.1e}"

    def row(self) -> str:
        """The line of docs/families.md."""
        steered = f"{self.places} | {self.norms}" if self.places else "- | -"
        return f"| {self.model_type} | {self.kind} | {self.verdict} | {steered} | {self.note} |"


def examine(model_type: str) -> Finding:
    """Build a family's tiny model, patch it, and hold it against the reference."""
    kind = tiny_families.kind(model_type)
    if model_type in tiny_families.CANNOT:
        return Finding(
            model_type, kind, REFUSED, note="not built here: " + tiny_families.CANNOT[model_type]
        )
    model = tiny_families.build(model_type)
    inputs = tiny_families.inputs(model)
    try:
        hidden = hidden_size(model)
        vector = torch.randn(hidden, generator=torch.Generator().manual_seed(1))
        with rk.patch(model, rk.Ablate(rk.Direction(vector))):
            pass
    except rk.InputError as error:
        return Finding(model_type, kind, REFUSED, note=str(error))
    try:
        return _compare(model_type, kind, model, inputs, rk.Direction(vector))
    except Exception as error:
        note = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Finding(model_type, kind, FAILED, note=note)


@torch.no_grad()
def _compare(
    model_type: str, kind: str, model: Any, inputs: dict[str, Tensor], direction: rk.Direction
) -> Finding:
    plain = model(**inputs, output_hidden_states=True).logits  # transformers leaves hooks for that
    try:
        consistent = generates_alike(model, inputs)
    except Exception:  # half a model
        consistent = False
    before = traces(model)
    finding = Finding(model_type, kind, FUSED)
    problems = []
    r = direction.unit
    edits: list[tuple[rk.Intervention, Callable[[Tensor], Tensor]]] = [
        (rk.Ablate(direction), lambda h: h - (h @ r).unsqueeze(-1) * r),
        (rk.Ablate(direction, 0.7), lambda h: h - 0.7 * (h @ r).unsqueeze(-1) * r),
        (rk.Add(direction, 0.3, sites="all"), lambda h: h + 0.3 * direction.vector),
    ]
    for intervention, edit in edits:
        name = f"{type(intervention).__name__} {intervention.strength:g}"
        want = reference(model, inputs, rowwise(edit, len(r)))
        with rk.patch(model, intervention) as handle, Taken() as taken:
            scores: list[Tensor] = []
            with handle.watch(
                lambda _, h, seen=scores: seen.append((h @ r).abs() / h.norm(dim=-1))
            ):
                got = model(**inputs).logits
            report = handle.report()
        error = float((got - want).abs().max() / want.abs().max())
        finding.error = max(finding.error, error)
        if error > TOLERANCE:
            problems.append(f"{name}: logits differ by {error:.1e}")
        if torch.equal(got, plain):
            problems.append(f"{name}: no effect")
        if intervention is edits[0][0]:
            finding.places, finding.norms = report.claimed, taken.count
            finding.score = max(float(s.max()) for s in scores)
            hooked = [s.name for s in report.sites if s.path == "hook" and s.name != "embed"]
            if hooked:
                finding.verdict = UNFUSED
                many = "places by hooks" if len(hooked) > 1 else "place by a hook"
                finding.note = f"{len(hooked)} {many} on submodules"
            if finding.score > 1e-5:
                problems.append(f"|r.h| is {finding.score:.1e} |h|")
    with rk.patch(model, edits[0][0]):
        if consistent and not generates_alike(model, inputs):
            problems.append("a cache changes what is generated")
        streams = model(**inputs, output_hidden_states=True).hidden_states or ()
    streams = [h for h in streams[:-1] if h.shape[-1] == len(r)]  # the last is after the last norm
    shown = [float((h @ r).abs().max()) <= 1e-4 * float(h.abs().max()) for h in streams]
    if not all(shown[1:]) and post_norm(model):
        finding.note += "; hidden_states are sums before their norm"
    elif not all(shown[1:]):
        problems.append("hidden_states shows a stream that is not steered")
    elif not all(shown):
        finding.note += "; " * bool(finding.note) + "hidden_states[0] is before its steering"
    with rk.patch(model, rk.Ablate(direction, 0.0), fuse_norms=False):
        if not torch.equal(model(**inputs).logits, plain):
            problems.append("strength 0 changes bits")
    if not torch.equal(model(**inputs).logits, plain):
        problems.append("removing the patch does not bring the plain logits back")
    left = [name for (name, *a), (_, *b) in zip(before, traces(model), strict=True) if a != b]
    if left:
        problems.append(f"something is left on {left[0] or 'the model'}")
    if problems:
        finding.verdict, finding.note = FAILED, "; ".join(problems)
    return finding


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return all of every module that a patch might leave something on."""
    return [
        (name, type(m), dir(m), sorted(vars(m)), [*m._forward_pre_hooks, *m._forward_hooks])
        for name, m in model.named_modules()
    ]


def generates_alike(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether generation with a cache gives the logits of generation without."""
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    cached, whole = (
        torch.stack(model.generate(**inputs, **settings, use_cache=c).logits) for c in (True, False)
    )
    return bool((cached - whole).abs().max() <= 10 * TOLERANCE * whole.abs().max())


def rowwise(edit: Callable[[Tensor], Tensor], hidden: int) -> Callable[[Tensor], Tensor]:
    """Let an edit of [..., hidden] act on rows that hold several streams side by side."""
    return lambda h: edit(h.unflatten(-1, (-1, hidden))).flatten(-2)


def reference(model: Any, inputs: dict[str, Tensor], edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the logits with every value of the stream edited, by other means than the patch."""
    if not post_norm(model):
        return stream_reference.steered_forward(model, inputs, edit)
    # what a post-norm model passes on is what its norms return
    layers = decoder_layers(model)
    if model.config.model_type == "minimax":  # the norm of the next block; a sum is left at the end
        parts = [m for x in layers for m in (x.input_layernorm, x.post_attention_layernorm)]
        hooks = [*parts, layers[-1]]
    else:
        hooks = [m for layer in layers for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    made = [module.register_forward_hook(lambda _, __, out: edit(out)) for module in hooks]
    if model.config.model_type != "minimax":
        start = layers[0].register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
        made.append(start)
    try:
        logits: Tensor = model(**inputs).logits
        return logits
    finally:
        for hook in made:
            hook.remove()


def post_norm(model: Any) -> bool:
    """Whether the norms of a model follow its adds."""
    return stream_reference.NOT_A_STREAM.get(model.config.model_type, "").startswith("post-norm")


class Taken:
    """Counts the norms that were taken from the add before, while inside."""

    def __enter__(self) -> "Taken":
        self.count, self._take = 0, Link.take

        def take(link: Link, x: Tensor) -> Tensor | None:
            normed = self._take(link, x)
            self.count += normed is not None
            return normed

        Link.take = take  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Link.take = self._take  # type: ignore[method-assign]


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return the counts, and the head of the table."""
    decoders = [f for f in findings if f.kind == "decoder"]
    fused = [f for f in decoders if f.verdict == FUSED]
    good = [f for f in decoders if f.verdict in (FUSED, UNFUSED)]
    return [
        f"transformers {transformers.__version__}: {len(findings)} types of causal language "
        f"models, {len(decoders)} of them decoders. `rk.patch` steers **{len(good)}** decoders "
        f"({len(good) / len(decoders):.1%}): {len(fused)} inside the residual add, of which "
        f"{sum(f.norms > 0 for f in fused)} with the RMSNorm after it.",
        "",
        "| type | kind | path | places | norms | note |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    sys.exit(pages.run("families.md", examine, summary))
