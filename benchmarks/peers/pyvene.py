"""pyvene: an intervention at the input of every block, the output of attention and of MLP."""

from contextlib import contextmanager

import pyvene

PLACES = tuple(
    f"model.layers[{{}}].{place}" for place in ("input", "self_attn.output", "mlp.output")
)


class Project(pyvene.ConstantSourceIntervention):
    """Takes a direction out of what it is given."""

    r = None

    def __init__(self, **settings):
        # [batch, tokens, hidden], not flattened to one row for each prompt
        super().__init__(**{**settings, "keep_last_dim": True})

    def forward(self, base, source=None, subspaces=None, **settings):
        return base - (base * self.r).sum(-1, keepdim=True) * self.r


@contextmanager
def steer(model, task):
    edit = type("Project", (Project,), {"r": task.per_row(model.dtype)})
    components = [
        {"component": place.format(n), "intervention_type": edit}
        for n in task.blocks(model.config.num_hidden_layers)
        for place in PLACES
    ]
    intervenable = pyvene.IntervenableModel(components, model=model)

    def call(**fed):
        _, steered = intervenable(base=fed, unit_locations=None)
        return steered

    yield call
