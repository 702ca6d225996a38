"""Candidate directions by other methods than the mean difference, or of winsorized activations.

Each method gives a unit vector; the candidate is the mean difference's component along it. So every
candidate points toward the harmful prompts, and adding it moves the stream along that vector as
far as adding the mean difference would. This makes the scores of methods comparable.

These methods keep the activations on the CPU in the model's dtype: prompts x layers x positions x
hidden numbers (256 prompts of an 8B model in bfloat16: 0.3 GB).
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.direction import MEAN_DIFFERENCE, Candidates, Means
from refusal_kernels.errors import InputError
from refusal_kernels.hf.chat import INSTRUCTION, ChatFormat
from refusal_kernels.hf.forward import read_inputs
from refusal_kernels.hf.model import hidden_size
from refusal_kernels.hf.padding import fitted
from refusal_kernels.progress import Progress
from refusal_kernels.research.extraction.collect import (
    last_tokens,
    layers_to_read,
    mean_difference,
    stream_prefix,
)

Fit = Callable[[Tensor, Tensor], Tensor]
"""From activations [harmful prompts, hidden] and [harmless prompts, hidden], float64, to a vector
[hidden] of any length and sign."""


def leace_vector(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Return what LEACE, the least-squares eraser, reads: covariance^-1 (mean difference).

    LEACE (Belrose et al. 2023) is the oblique projection ``h - u (v . (h - mean))``; u is the mean
    difference, and v is returned here. The covariance is shrunk as in the concept-erasure library.
    ``Erase.from_leace`` makes the projection itself.
    """
    from concept_erasure import LeaceFitter

    labels = torch.cat([torch.ones(len(harmful)), torch.zeros(len(harmless))])
    fitter = LeaceFitter.fit(
        torch.cat([harmful, harmless]), labels.to(harmful), constrain_cov_trace=False
    )
    read: Tensor = fitter.eraser.proj_right[0]  # [1, hidden]
    return read


def pca_vector(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Return the first principal axis of the differences of harmful and harmless pairs.

    Prompts are paired in the given order. The differences are not centered (Zou et al. 2023, who
    pair in random order).
    """
    pairs = min(len(harmful), len(harmless))
    differences = harmful[:pairs] - harmless[:pairs]
    return torch.linalg.svd(differences, full_matrices=False).Vh[0]


def probe_vector(harmful: Tensor, harmless: Tensor) -> Tensor:
    """Weights of a linear probe: scikit-learn's logistic regression, L2-regularized with C = 1.

    All features are divided by one number, the root mean square of what varies, so that the
    regularization does not depend on the scale of a layer's stream.
    """
    from sklearn.linear_model import LogisticRegression

    features = torch.cat([harmful, harmless])
    features = features - features.mean(dim=0)
    labels = [1] * len(harmful) + [0] * len(harmless)
    probe = LogisticRegression(max_iter=1000)
    probe.fit((features / features.square().sum(dim=-1).mean().sqrt()).cpu().numpy(), labels)
    return torch.from_numpy(probe.coef_[0]).to(harmful)


def winsorized(rows: Tensor, quantile: float) -> Tensor:
    """Clamp every row [rows, hidden] to plus and minus a quantile of its own absolute values.

    Against massive activations (Sun et al. 2024): a few channels are a thousand times as large as
    the others, above all at a prompt's first token. Where a mean difference holds a little of such
    a channel, ablating it takes the largest numbers out of that token.
    """
    most = rows.abs().quantile(quantile, dim=-1, keepdim=True)
    return rows.clamp(-most, most)


# the function, and the library that it needs beside torch: its module and its name
FITS: dict[str, tuple[Fit, str | None, str]] = {
    "leace": (leace_vector, "concept_erasure", "concept-erasure"),
    "pca": (pca_vector, None, ""),
    "probe": (probe_vector, "sklearn", "scikit-learn"),
}
METHODS = (MEAN_DIFFERENCE, *FITS)


def check_method(method: str, winsorize: float | None = None) -> None:
    """Check that a method exists and its library is installed, and that a quantile is one."""
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    if winsorize is not None and not 0 < winsorize < 1:
        raise InputError(f"winsorize is {winsorize}; expected a quantile above 0 and below 1")
    _, module, library = FITS.get(method, (None, None, ""))
    try:
        if module is not None:
            __import__(module)
    except ImportError:
        raise InputError(
            f'method {method!r} needs {library}; expected pip install "refusal-kernels[research]"'
        ) from None


def find_candidates(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[str],
    harmless: Sequence[str],
    *,
    method: str = MEAN_DIFFERENCE,
    winsorize: float | None = None,
    positions: int | None = None,
    last_layer: int | None = None,
    batch_size: int = 64,
    model_name: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Candidates:
    """Find a candidate direction for every layer and position, by any of the methods.

    Parameters
    ----------
    model, tokenizer, harmful, harmless, positions, last_layer, batch_size, model_name, checkpoint
        As for `mean_difference`; nothing else writes a checkpoint.
    method
        "mean_difference"; "leace", "pca" and "probe" as `leace_vector`, `pca_vector` and
        `probe_vector` say.
    winsorize
        Each prompt's activations are clamped to this quantile of their own absolute values first,
        as `winsorized` says: 0.995 leaves out what is massive. None: they are taken as they are.
    progress
        Called with the number of prompts done and the number of prompts in both sets.

    Returns
    -------
    Candidates
        Vectors that point toward the harmful prompts; zero where the method finds none, for
        example where the activations do not depend on the prompt.

    Raises
    ------
    InputError
        As `mean_difference`; also if the method does not exist or its library is missing.
    """
    check_method(method, winsorize)
    if method == MEAN_DIFFERENCE and winsorize is None:
        return mean_difference(
            model, tokenizer, harmful, harmless, positions=positions, last_layer=last_layer,
            batch_size=batch_size, model_name=model_name, checkpoint=checkpoint, progress=progress,
        )  # fmt: skip
    chat = ChatFormat.of(tokenizer)
    layers = layers_to_read(model, last_layer)
    positions = chat.positions if positions is None else positions
    total = len(harmful) + len(harmless)

    def told(before: int) -> Progress:
        return lambda done, _: None if progress is None else progress(before + done, total)

    kept = [
        _activations(model, chat, prompts, positions, layers, batch_size, told(before))
        for prompts, before in ((harmful, 0), (harmless, len(harmful)))
    ]
    for group, part in zip(("harmful", "harmless"), kept, strict=True):
        broken = (~part.isfinite()).any(dim=-1).nonzero()
        if len(broken):
            prompt, layer, place = broken[0].tolist()
            raise InputError(
                f"the group {group!r} met NaN or infinity at layer {layer}, position "
                f"{place - positions}, prompt {prompt}; try another dtype (float16 overflows)"
            )
    vectors = torch.zeros(positions, layers, hidden_size(model))
    means = Means(torch.zeros_like(vectors), torch.zeros_like(vectors))
    for layer in range(layers):
        for place in range(positions):
            pair = [part[:, layer, place].double() for part in kept]
            for mean, rows in zip(means, pair, strict=True):
                mean[place, layer] = rows.mean(dim=0)  # of what the stream holds
            if winsorize is not None:
                pair = [winsorized(rows, winsorize) for rows in pair]
            vectors[place, layer] = _candidate(method, *pair)
    name = method if winsorize is None else f"{method}, winsorized at {winsorize:g}"
    return Candidates(vectors, model_name, name, chat.render(INSTRUCTION), means)


def _candidate(method: str, harmful: Tensor, harmless: Tensor) -> Tensor:
    """Return the mean difference's component along what a method finds: float64 [hidden]."""
    difference = harmful.mean(dim=0) - harmless.mean(dim=0)
    every = torch.cat([harmful, harmless])
    if bool((every == every[0]).all()):
        return torch.zeros_like(difference)
    if method == MEAN_DIFFERENCE:
        return difference
    vector = FITS[method][0](harmful, harmless)
    norm = vector.norm()
    if not norm > 0:
        return torch.zeros_like(difference)
    unit = vector / norm
    return (unit @ difference) * unit


def _activations(
    model: Any,
    chat: ChatFormat,
    prompts: Sequence[str],
    positions: int,
    layers: int,
    batch_size: int,
    progress: Progress,
) -> Tensor:
    """Block inputs at the last tokens of every prompt: [prompts, layers, positions, hidden]."""
    kept: Tensor | None = None
    done = 0
    batches = fitted(model, chat.stream(prompts, batch_size))
    prefix = stream_prefix(model, [batches], positions, layers)
    for batch in batches:
        if int(batch.attention_mask[:, -positions:].sum()) < len(batch.rows) * positions:
            raise InputError(
                f"a prompt has fewer tokens than the {positions} positions that are read; leave it "
                "out or read fewer positions"
            )
        read: dict[int, Tensor] = {}

        def keep(layer: int, stream: Tensor, read: dict[int, Tensor] = read) -> None:
            read[layer] = last_tokens(model, stream, positions).clone()

        read_inputs(model, batch, layers - 1, keep, prefix)
        last = torch.stack([tokens.cpu() for tokens in read.values()], dim=1)
        if kept is None:
            kept = last.new_empty(len(prompts), *last.shape[1:])
        kept[batch.rows] = last
        progress(done := done + len(batch.rows), len(prompts))
    assert kept is not None  # there is a prompt, or the chat format has refused
    return kept
