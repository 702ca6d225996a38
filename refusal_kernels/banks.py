"""The tensors that the ops read, made of interventions: for patched models and for vLLM alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from refusal_kernels.errors import InputError
from refusal_kernels.intervention_base import ORTHONORMAL, Intervention

NUMBERS = 5  # of a slot: a, c, b, low, high


def slots_of(interventions: Sequence[Intervention]) -> int:
    """Return how many slots a program of these takes."""
    return sum(len(i.slots(1.0)) for i in interventions)


def vectors_of(interventions: Sequence[Intervention], slots: int) -> Tensor:
    """Return what a program reads and writes, float32 [2, slots, hidden]; zeros in slots to spare.

    Raises
    ------
    InputError
        If the hidden sizes differ.
    """
    sizes = {i.hidden for i in interventions}
    if len(sizes) > 1:
        raise InputError(
            f"directions of different hidden sizes: {sorted(sizes)}; expected those of one model"
        )
    (hidden,) = sizes
    vectors = torch.zeros(2, slots, hidden)
    terms = [slot for i in interventions for slot in i.slots(1.0)]
    for k, slot in enumerate(terms):
        vectors[0, k], vectors[1, k] = slot.read, slot.write
    return vectors


def params_of(
    interventions: Sequence[Intervention],
    slots: int,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return a program's numbers, [slots, 5]; `strength` multiplies the interventions'."""
    params = torch.zeros(slots, NUMBERS, dtype=dtype)
    terms = [slot for i in interventions for slot in i.slots(i.strength * strength)]
    for k, slot in enumerate(terms):
        params[k] = torch.tensor([slot.a, slot.c, slot.b, slot.low, slot.high], dtype=dtype)
    return params


def check_program(interventions: Sequence[Intervention]) -> None:
    """Refuse edits that interfere where they read the same stream.

    Each term of a program reads the stream as it was before all of them, so of what depends on the
    stream no term may read what another intervention writes: v_i . u_j is 0. And a term by itself
    is a projection: v_i . u_i is 1. What several terms of one intervention are to each other is
    that intervention's own affair.

    Raises
    ------
    InputError
        If two of them interfere.
    """
    each = [(owner, i.slots(1.0)) for owner, i in enumerate(interventions)]
    terms = [(slot, owner, len(slots)) for owner, slots in each for slot in slots if slot.reads]
    if not terms:
        return
    read = torch.stack([slot.read for slot, _, _ in terms]).double()
    write = torch.stack([slot.write for slot, _, _ in terms]).double()
    owners = torch.tensor([owner for _, owner, _ in terms])
    alone = torch.tensor([count == 1 for _, _, count in terms])
    checked = (owners[:, None] != owners) | torch.diag(alone)
    products = read @ write.T
    off = (products - torch.eye(len(terms), dtype=read.dtype)).abs().masked_fill(~checked, 0.0)
    own = int(off.diagonal().argmax())
    if float(off[own, own]) > ORTHONORMAL:
        raise InputError(
            f"the slot of an intervention has read . write = {float(products[own, own]):.4g}; "
            "expected 1, with every factor in a, c and b"
        )
    if (worst := float(off.max())) > ORTHONORMAL:
        raise InputError(
            "several directions at one place must be orthonormal; the largest cosine between "
            f"two of them is {worst:.4g}; orthonormalize them first (torch.linalg.qr)"
        )


def compile_program(interventions: Sequence[Intervention]) -> tuple[Tensor, Tensor]:
    """Make one program that does all of these at one place, each reading the same stream.

    Returns
    -------
    bank : Tensor
        float32 [1, 2, slots, hidden].
    params : Tensor
        float32 [1, slots, 5].

    Raises
    ------
    InputError
        If the hidden sizes differ, or two of them interfere (`check_program`).
    """
    slots = slots_of(interventions)
    vectors = vectors_of(interventions, slots)
    check_program(interventions)
    return vectors[None], params_of(interventions, slots)[None]
