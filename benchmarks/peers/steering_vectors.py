"""steering-vectors: its ablation operator at the input of every block, attention and MLP.

The input of a block is the output of the one before it, and of the first the embedding: a layer
matcher may be a function, so one list of layers holds both.
"""

from contextlib import ExitStack, contextmanager

from steering_vectors import SteeringVector
from steering_vectors.steering_operators import ablation_operator

CONFIG = {
    "decoder_block": lambda model, n: f"model.layers.{n - 1}" if n else "model.embed_tokens",
    "self_attn": "model.layers.{num}.self_attn",
    "mlp": "model.layers.{num}.mlp",
}


@contextmanager
def steer(model, task):
    task.refuse("steering-vectors")
    r = task.directions[0].to(model.dtype)
    blocks = task.blocks(model.config.num_hidden_layers)
    with ExitStack() as stack:
        for kind in CONFIG:
            vector = SteeringVector(dict.fromkeys(blocks, r), layer_type=kind)
            stack.enter_context(
                vector.apply(model, layer_config=CONFIG, operator=ablation_operator())
            )
        yield model
