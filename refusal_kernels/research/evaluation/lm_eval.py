"""The lm-evaluation-harness on a steered model: its model type ``refusal_kernels``.

The harness knows a model type only after its module was imported. So its command line is started
from here; it takes all options of the harness::

    python -m refusal_kernels.research.evaluation.lm_eval run --model refusal_kernels \
        --model_args pretrained=MODEL,direction=FILE,intervention=ablate --tasks mmlu
"""

import contextlib
import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusal_kernels.direction import Direction
from refusal_kernels.errors import InputError
from refusal_kernels.hf.adapters import add_adapter
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.hf.greedy import bare
from refusal_kernels.hf.loaded import REPORTED, check_loaded
from refusal_kernels.intervention_base import PLACE_FIELDS
from refusal_kernels.interventions import INTERVENTIONS, Intervention
from refusal_kernels.patching.patch import patch
from refusal_kernels.progress import Progress
from refusal_kernels.research.evaluation.rates import Rate

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    raise InputError(
        'the lm-evaluation-harness is not installed: pip install "refusal-kernels[research]"'
    ) from None

NONE = "none"


def intervention_of(
    direction: str | Path | Direction | None, intervention: str = "ablate", **settings: Any
) -> Intervention | None:
    """Make the edit that the arguments of the model type describe; None for "none" or no direction.

    The settings are as `Intervention.from_dict` takes them, further vectors by their files. Lists
    are also taken as one string with "+" between: ``layers=3+4``, ``sites=attn+mlp``.
    """
    if intervention not in (*INTERVENTIONS, NONE):
        known = ", ".join((*INTERVENTIONS, NONE))
        raise InputError(f"intervention is '{intervention}'; expected one of {known}")
    if direction is None and intervention not in ("ablate", NONE):
        raise InputError(f"direction=FILE is needed to {intervention}")
    if direction is None or intervention == NONE:
        return None
    if "layers" in settings:
        settings["layers"] = [_number(block) for block in _parts(settings["layers"])]
    if "sites" in settings:
        settings["sites"] = _parts(settings["sites"])
    return Intervention.from_dict({intervention: direction, **settings})


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, str):
        return value.split("+")
    return [value] if isinstance(value, int) else list(value)


def _number(text: Any) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"layers names {text!r}; expected numbers, as layers=3+4") from None


@register_model("refusal_kernels")
class SteeredLM(HFLM):
    """The harness's own Hugging Face model under one edit, or none.

    Without `edit` it is made of the other arguments by `intervention_of`. `pretrained` is a hub id,
    a folder, a key of `EMBEDDED`, or a transformers model; the harness's type ``hf`` takes all that
    is left.
    """

    AUTO_MODEL_CLASS: Any = None  # the harness chooses it
    _model: Any

    def __init__(
        self,
        pretrained: Any,
        edit: Intervention | None = None,
        direction: str | Path | Direction | None = None,
        intervention: str = "ablate",
        **kwargs: Any,
    ) -> None:
        kind = INTERVENTIONS.get(intervention, Intervention)
        names = {*kind.fields(), *PLACE_FIELDS} & set(kwargs)
        settings = {name: kwargs.pop(name) for name in names}
        if edit is None:
            edit = intervention_of(direction, intervention, **settings)
        if embedded := EMBEDDED.get(pretrained):
            pretrained = str(embedded.folder())
            adapter = {"peft": str(embedded.adapter)} if embedded.adapter else {}
            kwargs = {"dtype": "float32", **adapter, **kwargs}  # as everywhere
        super().__init__(pretrained=pretrained, **kwargs)
        self._undo = contextlib.ExitStack()
        self.handle = None if edit is None else patch(self.model, edit)
        if self.handle is not None:
            self._undo.callback(self.handle.remove)
        self._undo.enter_context(bare(self.model, "bos_token_id", "eos_token_id", "pad_token_id"))

    def _create_model(self, pretrained: str, peft: str | None = None, **kwargs: Any) -> None:
        """Load as the harness does, and refuse a model or an adapter that its files do not hold."""
        if peft is not None and kwargs.get("delta"):
            raise InputError("peft and delta exclude each other; give one")
        auto_class = self.AUTO_MODEL_CLASS
        self.AUTO_MODEL_CLASS = _Checked(auto_class)
        try:
            super()._create_model(pretrained, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        if peft is not None:
            tokens = len(self.tokenizer)
            if self._model.config.get_text_config().vocab_size != tokens:
                # as the harness does: the adapter may have added tokens
                self._model.resize_token_embeddings(tokens)
            self._model = add_adapter(self._model, peft, revision=kwargs.get("revision"))

    def close(self) -> None:
        """Give the model back unmodified."""
        self._undo.close()


class _Checked:
    """An auto class of transformers that checks what it loads."""

    def __init__(self, auto_class: Any) -> None:
        self.auto_class = auto_class

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        """As that of the auto class."""
        return check_loaded(name, *self.auto_class.from_pretrained(name, **{**kwargs, **REPORTED}))


def run_tasks(
    model: Any,
    tokenizer: Any,
    edits: Mapping[str, Intervention | None],
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    manager: Any = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    system: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Run tasks of the harness on one model under several edits.

    The model is unmodified again when this returns. The tasks have the harness's names, such as
    "mmlu"; `include` is a folder with more task files (YAML), and `manager` the result of
    `find_tasks`, to skip the search. `limit` keeps so many examples of each task (below 1: this
    share). With `chat` the questions are asked in the tokenizer's chat format.

    Returns
    -------
    dict
        By edit, task (or group) and metric: "value", "stderr" and, where every example is right
        or wrong, "k", "n" and the 95 % Wilson "interval".
    """
    import lm_eval

    manager = find_tasks(tasks, include) if manager is None else manager
    results = {}
    for number, (name, edit) in enumerate(edits.items(), 1):
        logger = logging.getLogger("lm_eval")
        level = logger.level
        logger.setLevel(logging.ERROR)  # its warnings are about being called from Python
        lm = SteeredLM(model, edit, intervention=NONE, tokenizer=tokenizer, batch_size=batch_size)
        try:
            result = lm_eval.simple_evaluate(
                model=lm, tasks=list(tasks), task_manager=manager, limit=limit,
                num_fewshot=num_fewshot, apply_chat_template=chat,
                system_instruction=system, log_samples=True,
                bootstrap_iters=1000, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        except Exception as error:  # of the harness, of data that cannot be loaded
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise InputError(f"lm-eval cannot run {', '.join(tasks)}: {reason}") from error
        finally:
            lm.close()
            logger.setLevel(level)
        results[name] = _summary(result)
        if progress is not None:
            progress(number, len(edits))
    return results


def find_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Any:
    """Return an ``lm_eval.tasks.TaskManager`` that knows the tasks.

    It searches the folder alone first: listing the harness's own tasks takes seconds.
    """
    from lm_eval.tasks import TaskManager

    if include is not None:
        if not Path(include).is_dir():
            raise InputError(f"{include} is no folder; expected one with task files (YAML)")
        included = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(included.all_tasks):
            return included
    manager = TaskManager(include_path=None if include is None else str(include))
    known = set(manager.all_tasks)
    if missing := [name for name in tasks if name not in known]:
        close = difflib.get_close_matches(missing[0], known, n=3)
        hint = f", such as {', '.join(close)}" if close else ""
        raise InputError(f"the harness has no task '{missing[0]}'; expected one of its own{hint}")
    return manager


def _summary(result: Any) -> dict[str, dict[str, Any]]:
    """Return metrics by task; with a Wilson interval if every example is right or wrong."""
    summary: dict[str, dict[str, Any]] = {}
    for task, metrics in {**result["results"], **result.get("groups", {})}.items():
        rows: dict[str, Any] = {}
        for key, value in metrics.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            rows[name] = {
                "value": float(value),
                "stderr": stderr if isinstance(stderr, int | float) else None,
            }
            hits = [
                sample[metric]
                for sample in result.get("samples", {}).get(task, ())
                if metric in sample and sample.get("filter", "none") == filtered
            ]
            if hits and all(hit in (0, 1) for hit in hits):
                rows[name] |= Rate.of(map(bool, hits)).to_dict()
        if rows:
            summary[task] = rows
    groups = result.get("group_subtasks", {})
    for group in groups:
        _pool(summary, groups, group)
    return summary


def _pool(
    summary: dict[str, dict[str, Any]], groups: Mapping[str, Sequence[str]], group: str
) -> None:
    """Give a group the interval of all its examples, if its value is their share."""
    for task in groups[group]:
        if task in groups:  # groups hold groups, as mmlu does
            _pool(summary, groups, task)
    for metric, row in summary.get(group, {}).items():
        parts = [summary.get(task, {}).get(metric, {}) for task in groups[group]]
        if "k" in row or not parts or not all("k" in part for part in parts):
            continue
        pooled = Rate.pooled(Rate(part["k"], part["n"]) for part in parts)
        if abs(pooled.value - row["value"]) < 1e-9:
            row |= pooled.to_dict()


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
