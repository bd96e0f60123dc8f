"""The lines and the bar that people see of a run."""

from __future__ import annotations

from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    Resumption,
    RunFacts,
    RunResult,
    Sink,
    StepFigures,
)
from bert_pretraining.logs.terminal import Terminal, clock, duration, results_table


class Console(Sink):
    """What people read of a run: see `Terminal`."""

    def __init__(self, terminal: Terminal, run: RunFacts) -> None:
        self._terminal, self._run = terminal, run
        self._latest = ""  # figures beside the bar
        self._target = f"{run.config.target_mlm_accuracy:g}"

    def said(self, text: str) -> None:
        self._terminal.line(text)

    def noticed(self, kind: str, text: str) -> None:
        self.said(f"Notice: {text}")

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        accuracy = evaluation.mlm_accuracy
        self._terminal.highlight(
            f"Start: MLM accuracy {accuracy:.4f} on {evaluation.num_sequences:,} sequences, loss "
            f"{evaluation.loss:.4f}, target {self._target}"
        )

    def resumed(self, resumption: Resumption) -> None:
        self._terminal.begin_at(resumption.steps)
        self.said(
            f"Resumed: {resumption.checkpoint}, step {resumption.steps}, "
            f"{resumption.samples:,} sequences"
        )
        if resumption.differences:
            differences = ", ".join(resumption.differences)
            self.said(f"Notice: not bit-identical to the run without a stop: {differences}")

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        updates = "update" if count == 1 else "updates"
        self.said(
            f"Skipped {count} {updates} before step {step + 1}: overflow in fp16; loss scale now "
            f"{loss_scale:g}"
        )

    def step_logged(self, figures: StepFigures) -> None:
        loss, accuracy, rate = (
            figures.values[name] for name in ("loss", "mlm_acc", "learning_rate")
        )
        speed, ahead = figures.sequences_per_second, figures.seconds_to_evaluation
        # Of a terminal's 80 columns, some are left for the bar itself.
        self._latest = f"loss {loss:.3f}, MLM acc {accuracy:.3f}, lr {rate:.2e}, {speed:,.0f} seq/s"
        if not self._terminal.has_bar_alone:
            words = "" if ahead is None else f", evaluation in {duration(ahead)}"
            self.said(
                f"Step {figures.step}/{self._run.config.max_steps}: loss {loss:.4f}, MLM accuracy "
                f"{accuracy:.4f}, learning rate {rate:.4g}, {speed:,.0f} sequences/s{words}"
            )

    def advanced(self, steps: int, seconds_to_evaluation: float | None) -> None:
        ahead = seconds_to_evaluation
        short = "" if ahead is None else f", eval in {clock(ahead)}"
        self._terminal.advance(steps, self._latest + short)

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        self._terminal.highlight(
            f"Evaluation: MLM accuracy {evaluation.mlm_accuracy:.4f}, target {self._target}, "
            f"loss {evaluation.loss:.4f}, after {evaluation.samples:,} sequences"
        )

    def finished(self, result: RunResult) -> None:
        self._terminal.close()
        reached = "reached" if result.converged else f"not reached (stopped by {result.reason})"
        self._terminal.highlight(
            f"Target {self._target} {reached} after {result.step} steps, {result.samples} sequences"
        )
        if result.resumed_from is not None:
            self.said(
                f"Resumed from step {result.resumed_from}: times and sequences per second are of "
                "what came after it; MLPerf has no resumed runs"
            )
        self.said(f"Logs: {self._run.folder}\n")
        config = self._run.config
        table = {
            "Model": f"BERT {config.name} {config.config}",
            "GPUs": f"{self._run.device_name} x{self._run.world_size}",
            "E2E": f"{result.e2e_time:.2f}s",
            "MLM Accuracy": f"{result.eval_mlm_accuracy:.3f}",
            "training_sequences_per_second": f"{result.sequences_per_second:.3f}",
            "final_loss": f"{result.eval_loss:.3f}",
        }
        self._terminal.highlight(results_table(table))

    def close(self) -> None:
        self._terminal.close()
