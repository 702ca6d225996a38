"""Orthogonalizes a tiny random model of every family of causal language models, in three ways.

    python tests/families/orthogonalize_matrix.py [MODEL_TYPE ...] [--write]

In memory, in float64, the edited model is held against `stream_reference`, which ablates by other
means than the package. Shard by shard, the files must hold the bits of the model edited in memory
and saved. As an adapter, what PEFT loads must give the logits of the edited model.
"""

import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import family_matrix
import pages
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

    @property
    def failed(self) -> bool:
        """Whether an edit gives what it must not."""
        return FAILED in (self.memory, self.shards, self.adapter)

    def numbers(self) -> str:
        """How many parameters were edited, and the error, for the terminal."""
        return f"{self.edited} edited, {self.error:.1e}"

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


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return the counts, and the head of the table."""
    decoders = [f for f in findings if f.kind == "decoder"]
    good = [f for f in decoders if f.memory in (EDITED, TEXT)]
    return [
        f"{VERSIONS}: **{len(good)}** of {len(decoders)} decoders can be orthogonalized.",
        "",
        "| type | kind | in memory | shard by shard | adapter | note |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    sys.exit(pages.run("orthogonalize.md", examine, summary))
