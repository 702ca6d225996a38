"""Measure the selection scores on an engine: every candidate is a program of requests."""

from collections.abc import Generator, Sequence

from refusal_kernels.direction import Direction
from refusal_kernels.hf.served import ServedModel
from refusal_kernels.interventions import Ablate, Add
from refusal_kernels.research.selection.measurement import Measurement, Question

ROWS = 4096  # that are sent at once; an interrupted run resumes after them


class ServedMeasurement(Measurement):
    """The same rows, each a prompt under a candidate's edit: candidate by candidate."""

    def __init__(
        self, model: ServedModel, question: Question, directions: Sequence[Direction]
    ) -> None:
        super().__init__(model, question, directions)
        every = range(len(self._prompts))
        rows = [
            (number, edit, prompt)
            for kind, prompts in ((Ablate, every), (Add, every[self._harmful :]))
            for number, direction in enumerate(directions)
            for edit in [kind(direction)]
            for prompt in prompts
        ]
        self._parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        self._sizes = list(map(len, self._parts))

    def _steps(self, done: int) -> Generator[None]:
        question = self.question
        for part in self._parts[done:]:
            prompts = [prompt for _, _, prompt in part]
            with self.model.under([edit for _, edit, _ in part]):
                scores = self.model.refusal_scores(
                    [self._prompts[prompt] for prompt in prompts],
                    question.tokens, question.unmodified, prompts,
                )  # fmt: skip
            for (number, edit, prompt), (score, kl) in zip(part, scores.tolist(), strict=True):
                if isinstance(edit, Add):
                    self._induce[number, prompt - self._harmful] = score
                else:
                    self._ablated[number, prompt] = score if prompt < self._harmful else kl
            yield
