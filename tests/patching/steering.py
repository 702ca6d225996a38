"""Ways to run a model with and without a patch, and to compare what they give."""

import functools
from contextlib import nullcontext

import torch
from tiny import plain_hooks

from refusal_kernels.patching.patch import patch

HIDDEN, LAYERS = 64, 3
SITES = 1 + 2 * LAYERS
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 10}
# float32 logits of a few units through different kernels (measured: at most 2.2e-6)
close = functools.partial(torch.testing.assert_close, rtol=0.0, atol=1e-5)


def hooks(model, direction):
    return plain_hooks(model, ablate=direction.vector)


def wanted(model, direction, tokens, **settings):
    with hooks(model, direction), torch.no_grad():
        return model(tokens, **settings).logits


def streams(model, tokens, *interventions, route=None, **call):
    """Run once; return the logits and the stream at every steered place."""
    seen = {}
    with patch(model, *interventions) as handle, torch.no_grad():
        routed = nullcontext() if route is None else handle.route(route)
        with routed, handle.watch(lambda name, h: seen.update({name: h.clone()})):
            logits = model(tokens, **call).logits
    return logits, seen


def is_plain(model):
    """Whether nothing is hooked to a model and its layers have the classes that they came with."""
    parts = list(model.modules())
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in parts)
    names = " ".join(type(m).__name__ for m in parts)
    return not (hooked or "Steered" in names or "Linked" in names)
