"""A run's figures for TensorBoard, where `tensorboard_dir` asks for them."""

from __future__ import annotations

from pathlib import Path

from bert_pretraining.errors import UserError


class TensorBoard:
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
                f"cannot write to tensorboard_dir {folder.parent} ({error.strerror}); pass "
                "another --tensorboard_dir"
            ) from error

    def scalars(self, step: int, figures: dict[str, float]) -> None:
        """figures: by tag, as in "training/loss"."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()
