"""Orthogonalizes a tiny random model of every family of causal language models, in three ways.

    python tests/families/orthogonalize_matrix.py [MODEL_TYPE ...] [--write docs/orthogonalize.md]

In memory, in float64, the edited model is held against `stream_reference`, which ablates by other
means than the package. Shard by shard, the files must hold the bits of the model edited in memory
and saved. As an adapter, what PEFT loads must give the logits of the edited model.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_matrix
import peft
import tiny_families
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import refusal_kernels as rk
from refusal_kernels.hf.model import hidden_size

VERSIONS = f"transformers {transformers.__version__} (and PEFT {peft.__version__})"
EDITED, TEXT, REFUSED, FAILED = "edited", "text only", "refused", "FAILED"
SAME, YES = "same bits", "yes"
# Relative to the largest logit. Of a model in float64, against float64; these families keep their
# stream, or sum a branch, in float32, whatever the weights are.
TOLERANCE, SINGLE = 1e-9, 1e-6
IN_SINGLE = frozenset("falcon_mamba hy_v3 hy_v4 mamba mamba2 nemotron_h".split())
# These do not run in float64 at all.
ONLY_SINGLE = frozenset("inkling2_loop_text mllama xglm".split())
IN_FLOAT32 = 1e-4  # two models of four random layers that round differently


@dataclass
class Finding:
    """How one family went.

    Attributes
    ----------
    memory, shards, adapter
        EDITED, TEXT, SAME, YES, REFUSED or FAILED; "-" where it was not tried.
    note
        Why, where something is refused.
    edited
        How many parameters of the tiny model.
    error
        Largest logit difference from ablation over the largest logit, in memory.
    """

    model_type: str
    kind: str
    memory: str
    shards: str = "-"
    adapter: str = "-"
    note: str = ""
    edited: int = 0
    error: float = 0.0

    def row(self) -> str:
        """The line of docs/orthogonalize.md."""
        cells = self.model_type, self.kind, self.memory, self.shards, self.adapter, self.note
        return "| " + " | ".join(cells) + " |"


def examine(model_type: str) -> Finding:
    """Orthogonalize a family's tiny model in every way."""
    finding = Finding(model_type, tiny_families.kind(model_type), REFUSED)
    if model_type in tiny_families.CANNOT:
        finding.note = "not built here: " + tiny_families.CANNOT[model_type]
        return finding
    model = tiny_families.build(model_type)
    try:
        hidden = hidden_size(model)
        direction = rk.Direction(torch.randn(hidden, generator=torch.Generator().manual_seed(1)))
        text_only = _in_memory(finding, model, direction)
    except rk.InputError as error:
        finding.note = _short(error)
        return finding
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for way in (_by_shards, _as_adapter):
            try:
                way(finding, model, direction, text_only, Path(folder))
            except rk.InputError as error:
                problems.append(_short(error))
    finding.note = "; ".join(filter(None, [finding.note, *problems]))
    return finding


def _short(error: Exception) -> str:
    """Cut the advice off a message, the numbers of a random model, and a set in any order."""
    text = str(error)
    for end in ("; ", ", so removing", ": |r.h| is", ". Incompatible modules"):
        text = text.partition(end)[0]
    return text


@torch.no_grad()
def _in_memory(finding: Finding, model: Any, direction: rk.Direction) -> bool:
    """Return whether the model had to be edited with text_only."""
    model, text_only = copy.deepcopy(model), False
    if finding.model_type not in ONLY_SINGLE:
        model = model.double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others take no float64
    edited = copy.deepcopy(model)
    try:
        report = rk.orthogonalize(edited, direction)
    except rk.InputError as error:
        if "text_only" not in str(error):
            raise
        text_only, finding.note = True, _short(error)
        report = rk.orthogonalize(edited, direction, text_only=True)
    inputs = _inputs(model)
    r = direction.vector.double() / direction.vector.double().norm()

    def ablate(h: Tensor) -> Tensor:
        unit = r.to(h.dtype)
        return h - (h @ unit).unsqueeze(-1) * unit

    expected = family_matrix.reference(model, inputs, family_matrix.rowwise(ablate, len(r)))
    plain, got = model(**inputs).logits, edited(**inputs).logits
    scale = expected.abs().max()
    finding.edited, finding.error = len(report.edited), float((got - expected).abs().max() / scale)
    limit = SINGLE if finding.model_type in IN_SINGLE else TOLERANCE
    limit = IN_FLOAT32 if finding.model_type in ONLY_SINGLE else limit
    finding.memory = TEXT if text_only else EDITED
    if not finding.error <= limit or not (plain - expected).abs().max() > 0.05 * scale:
        finding.memory, finding.note = FAILED, f"logits differ by {finding.error:.1e}"
    return text_only


def _by_shards(
    finding: Finding, model: Any, direction: rk.Direction, text_only: bool, folder: Path
) -> None:
    finding.shards = REFUSED
    model.save_pretrained(folder / "source", max_shard_size="200KB")
    rk.orthogonalize_checkpoint(
        folder / "source", folder / "target", direction, text_only=text_only
    )
    edited = copy.deepcopy(model)
    rk.orthogonalize(edited, direction, text_only=text_only)
    edited.save_pretrained(folder / "expected", max_shard_size="200KB")
    got, expected = _tensors(folder / "target"), _tensors(folder / "expected")
    same = got.keys() == expected.keys() and all(torch.equal(got[k], expected[k]) for k in got)
    finding.shards = SAME if same else FAILED


@torch.no_grad()
def _as_adapter(
    finding: Finding, model: Any, direction: rk.Direction, text_only: bool, folder: Path
) -> None:
    finding.adapter = REFUSED
    rk.orthogonalize_lora(model, direction, folder / "adapter", text_only=text_only)
    edited = copy.deepcopy(model)
    rk.orthogonalize(edited, direction, text_only=text_only)
    inputs = _inputs(model)
    expected = edited(**inputs).logits
    got = peft.PeftModel.from_pretrained(model, str(folder / "adapter"))(**inputs).logits
    close = (got - expected).abs().max() <= IN_FLOAT32 * expected.abs().max()
    finding.adapter = YES if close else FAILED


def _inputs(model: Any) -> dict[str, Tensor]:
    """Text alone: mllama's images write through layers that are left as they are."""
    given = tiny_families.inputs(model)
    return {name: given[name] for name in ("input_ids", "attention_mask")}


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def document(findings: Sequence[Finding]) -> str:
    """Return docs/orthogonalize.md."""
    decoders = [f for f in findings if f.kind == "decoder"]
    good = [f for f in decoders if f.memory in (EDITED, TEXT)]
    lines = [
        "# Orthogonalized weights",
        "",
        "Generated by `python tests/families/orthogonalize_matrix.py --write docs/orthogonalize.md`"
        "; the test suite checks every row.",
        "",
        "`rk.orthogonalize` projects a direction out of every parameter that writes into the "
        "residual stream: token and position embeddings, output projections, experts, their "
        "biases. Which those are is found by following a forward pass, op by op, from the "
        "parameters to the adds. Where the edit would not be ablation the model is refused, with "
        "the reason: a norm or a gain per channel stands between what writes and the stream, or a "
        "parameter has another use besides. Ablation at run time (`rk.patch`) is exact there too.",
        "",
        f"Of the {len(decoders)} decoder-only families of {VERSIONS} **{len(good)}** can be "
        "orthogonalized. For each a tiny random model in float64 agrees "
        "with a reference that ablates by other means (`tests/families/stream_reference.py`) to "
        f"{TOLERANCE:g} of the largest logit; {SINGLE:g} in {len(IN_SINGLE)} families that keep "
        f"their stream, or sum a branch, in float32; {IN_FLOAT32:g} in {len(ONLY_SINGLE)} that run "
        "in float32 alone.",
        "",
        "- *in memory*: `rk.orthogonalize`. *text only*: with `text_only=True`; what images or "
        "audio write is left as it is.",
        "- *shard by shard*: `rk.orthogonalize_checkpoint`, whose files hold the bits of the model "
        "edited in memory and saved. It takes less memory than 2.5 of the largest tensor, and a "
        "run that was killed goes on where it was.",
        "- *adapter*: `rk.orthogonalize_lora`, of rank one; what PEFT loads gives the edited "
        "model's logits. Biases that write have no LoRA term: the adapter holds their new values, "
        "and switching it off does not bring the old ones back. Where the output matrix is the "
        "embedding, untie the two before a merge.",
        "- *kind*: a decoder; an encoder with a language-model head; half of an encoder-decoder.",
        "",
        "| type | kind | in memory | shard by shard | adapter | note |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f.row() for f in findings]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine families, print a line for each, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", default=[], metavar="MODEL_TYPE")
    parser.add_argument("--write", type=Path, help="write the page here (all families)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    findings = []
    for model_type in options.model_types or tiny_families.MODEL_TYPES:
        found = examine(model_type)
        findings.append(found)
        print(f"{found.row()} {found.edited} edited, {found.error:.1e}", flush=True)
    if options.write:
        options.write.write_text(document(findings))
    return int(any(FAILED in (f.memory, f.shards, f.adapter) for f in findings))


if __name__ == "__main__":
    sys.exit(main())
