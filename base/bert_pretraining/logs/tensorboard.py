"""A run's figures for TensorBoard, where `tensorboard_dir` asks for them."""

from __future__ import annotations

from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.logs.sinks import EvaluationFigures, Sink, StepFigures


class TensorBoard(Sink):
    """Scalars by update. The package is imported here alone: it is optional, and heavy.

    Args:
        folder: of this run; TensorBoard shows its parent's folders side by side.

    Raises:
        UserError: `folder` cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise UserError(
                f"cannot write to tensorboard_dir {folder.parent} ({error.strerror})",
                "pass another --tensorboard_dir",
            ) from error

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        self.evaluated(evaluation)

    def step_logged(self, figures: StepFigures) -> None:
        values = figures.values
        shown = {
            "training/loss": values["loss"],
            "training/mlm_accuracy": values["mlm_acc"],
            "training/learning_rate": values["learning_rate"],
            "training/sequences_per_second": figures.sequences_per_second,
        }
        self._write(figures.step, shown)

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        figures = {"loss": evaluation.loss, "mlm_accuracy": evaluation.mlm_accuracy}
        shown = {f"evaluation/{name}": value for name, value in figures.items()}
        self._write(evaluation.step, shown)

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, figures: dict[str, float]) -> None:
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)
