"""A run of figures that a test makes up, and the notices that it gets."""

from __future__ import annotations

from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Hyperparameters,
    RunOutline,
    StepFigures,
)
from bert_pretraining.logs.watch import Watch
from mlperf_logs import facts

SHAPE = {"name": "mini", "config": "CPUx1x1", "train_batch_size": 64, "learning_rate": 0.004,
         "warmup_steps": 0, "eval_steps": 0, "eval_interval_samples": 640}  # fmt: skip


class Watched:
    """A run of some figures, and what was noticed: kinds and texts.

    baseline: the share of the commonest of `masked_tokens` tokens. sequences: of the evaluation
    set. model: layers and hidden size.
    """

    def __init__(
        self,
        baseline: float = 0.05,
        masked_tokens: int = 10_000,
        sequences: int = 10_000,
        model: tuple[int, int] = (2, 64),
        **flags: object,
    ) -> None:
        self.found: dict[str, str] = {}
        self._sequences = sequences
        run = facts(**{**SHAPE, "max_steps": 10_000, **flags})
        self.batch = run.config.global_batch_size
        self.watch = Watch(run, self.noticed)
        self.watch.hyperparameters(Hyperparameters(1))
        self.watch.outlined(RunOutline(1, *model, 1, 1, "", "fp32", None))
        self.watch.evaluation_set_read(EvaluationSetFacts(masked_tokens, 1996, baseline))

    def noticed(self, kind: str, text: str) -> None:
        assert kind not in self.found, "a notice comes once"
        assert "\n" not in text
        self.found[kind] = text

    def start(self, accuracy: float, loss: float = 2.7) -> None:
        self.watch.start_evaluated(self.figures(0, accuracy, loss))

    def evaluated(self, step: int, accuracy: float, loss: float = 2.7) -> None:
        self.watch.evaluated(self.figures(step, accuracy, loss))

    def figures(self, step: int, accuracy: float, loss: float) -> EvaluationFigures:
        samples = step * self.batch
        return EvaluationFigures(step, samples, loss, accuracy, self._sequences, 1.0)

    def logged(self, step: int, accuracy: float = 0.4, loss: float = 2.7) -> None:
        values = {"loss": loss, "mlm_acc": accuracy, "learning_rate": 1e-3}
        self.watch.step_logged(StepFigures(step, step * self.batch, values, 100.0, None))
