"""A model on vLLM, for Python and for the experiment: `rk.Engine`."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from refusal_kernels.banks import slots_of
from refusal_kernels.errors import InputError, first_line
from refusal_kernels.hf.chat_models import load_tokenizer
from refusal_kernels.hf.embedded import EMBEDDED
from refusal_kernels.hf.generate import generate
from refusal_kernels.hf.load import model_folder
from refusal_kernels.hf.model import hidden_size
from refusal_kernels.hf.served import MomentState, Prompts, ServedModel
from refusal_kernels.interventions import Intervention
from refusal_kernels.progress import Progress
from refusal_kernels.vllm.frontend import MOST_PROGRAMS, catalog_of, following, set_programs
from refusal_kernels.vllm.names import (
    GROUPS,
    KEY,
    LOGITS,
    MOMENTS,
    PROJECTION,
    READ,
    READING,
    SCORES,
    STEER,
)
from refusal_kernels.vllm.programs import NONE, spelled

Edit = str | Intervention | None
"""The name of a program, or an intervention; None for the unmodified model."""
LOGITS_AT_ONCE = 2**26  # float32: 256 MiB that travel between the processes


class Engine(ServedModel):
    """A model on vLLM, over as many GPUs as it is given.

    The functions of the experiment take it in the place of a model: `mean_difference`, `select`,
    `evaluate` and what they are made of.

    Parameters
    ----------
    model
        A hub id, a folder, or a model that is known by name, as for `rk.load`.
    programs
        Interventions, or lists of them, by name.
    tensor_parallel_size, pipeline_parallel_size
        Over how many devices each layer, and the layers, are spread.
    positions
        How many tokens at the end of a prompt `mean_difference` and `evaluate` may read.
    slots
        The most slots of a program; by default the largest of `programs`.
    engine_args
        Any argument of ``vllm.LLM``.

    Attributes
    ----------
    llm
        The ``vllm.LLM``.
    tokenizer
        The model's tokenizer, as transformers reads it.

    Raises
    ------
    InputError
        If vLLM is not installed, the engine does not start, or it cannot steer the model.

    Examples
    --------
    >>> with rk.Engine(model, {"ablate": rk.Ablate(direction)}) as engine:  # doctest: +SKIP
    ...     engine.generate(["..."] * 1000, "ablate")
    """

    def __init__(
        self,
        model: str,
        programs: Mapping[str, Intervention | Sequence[Intervention]] | None = None,
        *,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        positions: int = 0,
        slots: int | None = None,
        **engine_args: Any,
    ) -> None:
        try:
            from vllm import LLM
            from vllm import __version__ as version
            from vllm.platforms import current_platform
        except ImportError as error:
            raise InputError(
                f"the engine needs vLLM, which cannot be loaded ({first_line(error)}): "
                "pip install vllm"
            ) from None
        ranks = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
        }
        device = current_platform.get_device_name()
        self.about = {"name": "vllm", "version": version, "device": device, **ranks}
        given = {
            name: [program] if isinstance(program, Intervention) else list(program)
            for name, program in (programs or {}).items()
        }
        self.positions = positions
        if model in EMBEDDED and engine_args.get("dtype", "auto") == "auto":
            engine_args["dtype"] = "float32"  # as `rk.load`
        self.path = model_folder(model)
        self._source = {
            key: engine_args[key] for key in ("revision", "trust_remote_code") if key in engine_args
        }
        additional = engine_args.pop("additional_config", None) or {}
        if not isinstance(additional, dict) or not isinstance(additional.get(KEY, {}), dict):
            raise InputError(f"additional_config, and {KEY!r} in it, must be objects")
        settings = {
            "slots": slots or max(map(slots_of, given.values()), default=1),
            "reads": positions,
        }
        additional = {**additional, KEY: {**additional.get(KEY, {}), **settings}}
        # prompts come as tokens, and answers are decoded with the chat format
        options = {"skip_tokenizer_init": True, "generation_config": "vllm", **engine_args}
        token = following.set(spelled(given) if given else None)
        try:
            self.llm = LLM(model=self.path, additional_config=additional, **ranks, **options)
        except InputError:
            raise
        except Exception as error:  # whatever vLLM raises
            raise InputError(f"the engine does not start: {first_line(error)}") from error
        finally:
            following.reset(token)
        model_config = self.llm.llm_engine.model_config
        self.config, self.dtype = model_config.hf_config, model_config.dtype
        self.layers = model_config.get_total_num_hidden_layers()
        self.longest = model_config.max_model_len
        self._numbers = itertools.count()
        self._named: dict[Intervention, str] = {}  # the names of interventions that were asked for
        self._edits: tuple[Edit, ...] = (None,)
        try:
            self._set_programs(given)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Stop the engine and free its devices."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            cleanup_dist_env_and_memory()

    @cached_property
    def tokenizer(self) -> Any:
        """See above."""
        return load_tokenizer(self.path, **self._source)

    @cached_property
    def generation_config(self) -> Any:
        """See above."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.path, **self._source)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    def generate(
        self,
        prompts: Sequence[str],
        edits: Edit | Sequence[Edit] = None,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Answer every prompt greedily, in its chat format.

        Parameters
        ----------
        prompts
            The instructions, without the chat format.
        edits
            The name of a program, an intervention, or None; or one of these for each prompt.
        max_new_tokens
            The most tokens of an answer.

        Raises
        ------
        InputError
            If there is no such program, or as `refusal_kernels.generate`.
        """
        each = [edits] if edits is None or isinstance(edits, str | Intervention) else edits
        with self.under(each):
            return generate(self, self.tokenizer, prompts, max_new_tokens)

    # --- what `ServedModel` describes

    @contextlib.contextmanager
    def under(self, edits: Sequence[Edit]) -> Iterator[None]:
        """See `ServedModel.under`; an edit may also be the name of a program."""
        outer, self._edits = self._edits, tuple(edits)
        try:
            yield
        finally:
            self._edits = outer

    def refusal(self, edit: Intervention) -> str | None:
        """See `ServedModel.refusal`."""
        try:
            catalog_of(self.llm).plan(*spelled({type(edit).__name__: [edit]}))
        except InputError as error:
            return str(error)
        return None

    def answers(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        ends: Sequence[int],
        progress: Progress | None = None,
    ) -> list[list[int]]:
        """See `ServedModel.answers`."""
        outputs = self._ask(prompts, progress, max_tokens=max_new_tokens, stop_token_ids=list(ends))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def logits(self, prompts: Prompts) -> Tensor:
        """See `ServedModel.logits`."""
        step, parts = max(1, LOGITS_AT_ONCE // int(self.config.get_text_config().vocab_size)), []
        outer = self._programs_of(prompts)
        for start in range(0, len(prompts), step):
            rows = slice(start, start + step)
            with self.under(outer[rows]):
                self._ask(prompts[rows], reads=[(LOGITS, k) for k in range(len(prompts[rows]))])
            parts.append(self._taken(LOGITS, torch.float32))
        return torch.cat(parts)

    def refusal_scores(
        self,
        prompts: Prompts,
        tokens: Sequence[int],
        unmodified: Tensor,
        rows: Sequence[int],
        progress: Progress | None = None,
    ) -> Tensor:
        """See `ServedModel.refusal_scores`."""
        count, vocabulary = unmodified.shape
        self._call("compare", list(tokens), vocabulary, unmodified.numpy().tobytes())
        reads = [(SCORES, k * count + row) for k, row in enumerate(rows)]
        self._ask(prompts, progress, reads=reads)
        return self._taken(SCORES, torch.float64)

    def log_likelihoods(self, prompts: Prompts) -> list[list[float]]:
        """See `ServedModel.log_likelihoods`."""
        outputs = self._ask(prompts, prompt_logprobs=0)
        return [
            [found[token].logprob for token, found in zip(ids, output.prompt_logprobs, strict=True)
             if found is not None]
            for ids, output in zip(prompts, outputs, strict=True)
        ]  # fmt: skip

    def moments(
        self, prompts: Prompts, groups: Sequence[int], progress: Progress | None = None
    ) -> MomentState:
        """See `ServedModel.moments`."""
        self._check_reads()
        reads = [(MOMENTS, group) for group in groups]
        self._ask(prompts, progress, reads=reads, skip_reading_prefix_cache=True)
        shape = self.layers, GROUPS, self.positions
        state = MomentState(
            torch.zeros(shape, dtype=torch.int64),
            *torch.zeros(2, *shape, hidden_size(self), dtype=torch.float64),
        )
        for layer, *found in (row for part in self._call("take_moments") for row in part):
            if layer < self.layers:  # behind it: the output of the last one
                for tensor, data in zip(state, found, strict=True):
                    tensor[layer] = _tensor(data, tensor.dtype).view_as(tensor[layer])
        return state

    def projections(self, prompts: Prompts, unit: Tensor, position: int) -> Tensor:
        """See `ServedModel.projections`."""
        self._check_reads()
        self._call("watch", unit.tolist(), position)
        reads = [(PROJECTION, number) for number in range(len(prompts))]
        self._ask(prompts, reads=reads, skip_reading_prefix_cache=True)
        table = torch.full((self.layers + 1, len(prompts)), torch.nan)
        for numbers, layers, data in self._call("take", PROJECTION):
            values = _tensor(data, torch.float32).view(len(numbers), len(layers))
            table[torch.tensor(layers)[:, None], torch.tensor(numbers)] = values.T
        return table

    # --- requests

    def _ask(
        self,
        prompts: Prompts,
        progress: Progress | None = None,
        *,
        reads: Sequence[tuple[str, int]] | None = None,
        max_tokens: int = 1,
        **params: Any,
    ) -> list[Any]:
        """Send all prompts at once; return vLLM's outputs, in their order."""
        from vllm import SamplingParams

        if not prompts:
            raise InputError("there is no prompt; expected one at least")
        if (longest := max(map(len, prompts))) + max_tokens > self.longest:
            raise InputError(
                f"a prompt has {longest} tokens in its chat format and {max_tokens} to come; the "
                f"engine takes {self.longest} (max_model_len)"
            )
        if reads is not None:
            self._call("clear")  # what was read before an interruption
        engine, outputs = self.llm.llm_engine, dict[str, Any]()
        names, asked = self._programs_of(prompts), list[str]()
        try:
            for k, (ids, name) in enumerate(zip(prompts, names, strict=True)):
                extra = {STEER: name} | ({} if reads is None else {READ: [*reads[k], len(ids)]})
                sampling = SamplingParams(
                    temperature=0.0, detokenize=False, ignore_eos=True, max_tokens=max_tokens,
                    extra_args=extra, **params,
                )  # fmt: skip
                asked.append(str(next(self._numbers)))
                self._send(asked[-1], ids, sampling)
            while engine.has_unfinished_requests():
                outputs |= {out.request_id: out for out in engine.step() if out.finished}
                if progress is not None:
                    progress(len(outputs), len(prompts))
        except BaseException:  # the next one who asks must not get these answers
            engine.abort_request([number for number in asked if number not in outputs])
            raise
        return [outputs[number] for number in asked]

    def _send(self, number: str, ids: list[int], sampling: Any) -> None:
        from vllm.exceptions import VLLMValidationError

        try:
            self.llm.llm_engine.add_request(number, {"prompt_token_ids": list(ids)}, sampling)
        except VLLMValidationError as error:
            raise InputError(str(error.args[0])) from None

    def _programs_of(self, prompts: Prompts) -> list[str]:
        """Return the name of each prompt's program, and make those that the engine lacks."""
        edits = self._edits * len(prompts) if len(self._edits) == 1 else self._edits
        if len(edits) != len(prompts):
            raise InputError(
                f"{len(edits)} edits for {len(prompts)} prompts; expected one for each"
            )
        given = {edit: [edit] for edit in edits if isinstance(edit, Intervention)}
        if new := [edit for edit in given if edit not in self._named]:
            # one stays free, for `refusal`
            if len(catalog_of(self.llm).programs) + len(new) >= MOST_PROGRAMS:
                set_programs(self.llm, dict.fromkeys(self._named.values()))
                self._named, new = {}, list(given)
            names = {edit: f"edit {next(self._numbers)}" for edit in new}
            self._set_programs({name: given[edit] for edit, name in names.items()})
            self._named |= names  # now that the engine has them
        return [
            NONE if edit is None else self._named[edit] if isinstance(edit, Intervention) else edit
            for edit in edits
        ]

    def _set_programs(self, programs: Mapping[str, Sequence[Intervention]]) -> None:
        if programs:
            set_programs(self.llm, *spelled(programs))

    # --- what the workers read

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `Reading` in every worker; return what is not None."""
        answers = self.llm.collective_rpc(READING, args=(method, *args))
        return [answer for answer in answers if answer is not None]

    def _taken(self, kind: str, dtype: torch.dtype) -> Tensor:
        """Return what was read after each prompt, [prompts, ...], by their numbers."""
        ((numbers, _, data),) = self._call("take", kind)
        values = _tensor(data, dtype).view(len(numbers), -1)
        return values[torch.tensor(numbers).argsort()]

    def _check_reads(self) -> None:
        if not self.positions:
            raise InputError(
                "this engine reads no positions; start it with Engine(..., positions=N), of the "
                "last N tokens of every prompt"
            )


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
