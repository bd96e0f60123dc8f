"""The lines and the bar that people see of a run, and `console.txt`, which keeps every line."""

from __future__ import annotations

import time

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.result_tables import (
    one_row_table,
    outline_lines,
    speed_rows,
    two_column_table,
    upstream_rows,
)
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    Resumption,
    RunFacts,
    RunOutline,
    RunResult,
    Sink,
    StepFigures,
)
from bert_pretraining.logs.terminal import Terminal, clock, duration
from bert_pretraining.logs.time_to_target import samples_at_target
from bert_pretraining.runtime.words import counted, plural

ALWAYS_SHOWN = ("Notice: ", "Warning: ", "Energy: ")
# Parts of a line of figures that a terminal does not get where the line would wrap, in this order.
LEFT_OUT = ("target", "loss", "sequences in all")


class Console(Sink):
    """What people read of a run.

    On a terminal that is: an outline, the bar, a line an evaluation, warnings and results. What
    parts say while they are built goes to the file alone. Where stdout is no terminal, it gets
    every line but the outline, and a line a logged step in place of the bar.

    Args:
        terminal: stdout.
        run: its facts.
        file: gets every line, whatever stdout is; closed with this sink.
    """

    def __init__(self, terminal: Terminal, run: RunFacts, file: LineFile) -> None:
        self._terminal, self._run, self._file = terminal, run, file
        self._outline: RunOutline | None = None
        self._resumption: Resumption | None = None
        self._trains = False
        self._figures: dict[str, str] = {}  # beside the bar, see `Bar`
        self._evaluations: list[tuple[int, float]] = []  # (sequences, accuracy) since the start
        self._evaluated_at: list[float] = []  # when each of these ended, Unix time in seconds
        self._target_at: float | None = None  # when the target is expected, in the same
        self._target = f"{run.config.target_mlm_accuracy:g}"

    def said(self, text: str) -> None:
        if self._terminal.is_watched and not self._trains and not text.startswith(ALWAYS_SHOWN):
            self._file.line(text)
        else:
            self._tell(text)

    def noticed(self, kind: str, text: str) -> None:
        self._tell(f"Notice: {text}")

    def outlined(self, outline: RunOutline) -> None:
        self._outline = outline
        self._file.line(outline_lines(self._run, outline))
        if self._terminal.is_watched:
            columns = self._terminal.columns
            self._terminal.line(outline_lines(self._run, outline, columns))

    def evaluation_started(self, samples: int) -> None:
        self._figures["evaluation"] = "evaluating"
        self._terminal.show(self._figures)

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        accuracy = evaluation.mlm_accuracy
        self._tell_figures(
            {
                "accuracy": f"Start: MLM accuracy {accuracy:.4f} on "
                f"{counted(evaluation.num_sequences, 'sequence')}",
                "loss": f"loss {evaluation.loss:.4f}",
                "target": f"target {self._target}",
            }
        )

    def resumed(self, resumption: Resumption) -> None:
        self._resumption = resumption
        self._terminal.begin_at(resumption.steps)
        self._tell(
            f"Resumed: {resumption.checkpoint}, step {resumption.steps:,}, "
            f"{counted(resumption.samples, 'sequence')}"
        )
        if resumption.differences:
            differences = ", ".join(resumption.differences)
            self._tell(f"Notice: not bit-identical to the run without a stop: {differences}")

    def training_began(self) -> None:
        self._trains = True
        self._figures.pop("evaluation", None)
        self._terminal.begin_at(0)

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        self._tell(
            f"Skipped {counted(count, 'update')} before step {step + 1}: overflow in fp16; "
            f"loss scale now {loss_scale:g}"
        )

    def step_logged(self, figures: StepFigures) -> None:
        loss, accuracy, rate = (
            figures.values[name] for name in ("loss", "mlm_acc", "learning_rate")
        )
        speed, ahead = figures.sequences_per_second, figures.seconds_to_evaluation
        self._figures |= {
            "loss": f"loss {loss:.3f}",
            "accuracy": f"acc {accuracy:.3f}",
            "learning_rate": f"lr {rate:.2e}",
            "speed": f"{speed:,.0f} seq/s",
        }
        words = "" if ahead is None else f", evaluation in {duration(ahead)}"
        line = (
            f"Step {figures.step}/{self._run.config.max_steps}: loss {loss:.4f}, MLM accuracy "
            f"{accuracy:.4f}, learning rate {rate:.4g}, {speed:,.0f} sequences/s{words}"
        )
        self._file.line(line)
        if not self._terminal.has_bar_alone:
            self._terminal.line(line)

    def advanced(self, steps: int, seconds_to_evaluation: float | None) -> None:
        self._figures.pop("evaluation", None)
        if seconds_to_evaluation is not None:
            self._figures["evaluation"] = f"eval in {clock(seconds_to_evaluation)}"
        self._figures.pop("target", None)
        if self._target_at is not None and self._target_at > time.time():
            self._figures["target"] = f"target in ~{clock(self._target_at - time.time())}"
        self._terminal.advance(steps, self._figures)

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        self._evaluations.append((evaluation.samples, evaluation.mlm_accuracy))
        self._evaluated_at.append(time.time())
        self._target_at = self._expected_target()
        samples = f"{evaluation.samples:,}"
        self._tell_figures(
            {
                "accuracy": f"Evaluation: MLM accuracy {evaluation.mlm_accuracy:.4f}",
                "target": f"target {self._target}",
                "loss": f"loss {evaluation.loss:.4f}",
                "samples": f"after {samples} {plural(evaluation.samples, 'sequence')}",
            },
            # The lines of later evaluations are longer, and leave out the same.
            grows_by=len(f"{self._end:,}") - len(samples),
        )

    @property
    def _end(self) -> int:
        """The sequences of the run if it does not meet its target."""
        config = self._run.config
        return min(config.max_steps * config.global_batch_size, config.max_samples_termination)

    def _expected_target(self) -> float | None:
        """When the target is expected, at the speed since the evaluation before."""
        target = self._run.config.target_mlm_accuracy
        found = samples_at_target(self._evaluations, target, self._end)
        if found is None:
            return None
        (before, _), (now, _) = self._evaluations[-2:]
        seconds = (self._evaluated_at[-1] - self._evaluated_at[-2]) / (now - before)
        return self._evaluated_at[-1] + (found - now) * seconds

    def finished(self, result: RunResult) -> None:
        self._terminal.close()
        logs = f"Logs: {self._run.folder}"
        if (nothing := self._nothing_to_do(result)) is not None:
            self._highlight(nothing)
            self._highlight(logs)
            return
        reached = "reached" if result.converged else f"not reached (stopped by {result.reason})"
        self._tell_figures(
            {
                "reached": f"Target {self._target} {reached} after {counted(result.step, 'step')}",
                "sequences in all": counted(result.samples, "sequence"),
            }
        )
        if result.resumed_from is not None:
            self._tell(
                f"Resumed from step {result.resumed_from:,}: times and sequences per second are of "
                "what came after it; MLPerf has no resumed runs"
            )
        rows = upstream_rows(self._run, result)
        more = speed_rows(result, self._outline.matrix_rate if self._outline else None)
        what_now = self._what_now(result)
        tables = [one_row_table(rows), *([two_column_table(("Speed", ""), more)] if more else [])]
        self._file.line("\n\n".join(["\n".join([*what_now, logs]), *tables]))
        if self._terminal.is_watched:
            table = two_column_table(("Result", ""), {**rows, **more}, self._terminal.columns)
            self._terminal.line("\n".join(["", table, "", *what_now]))
            self._terminal.highlight(logs)
            return
        self._terminal.line("\n".join([*what_now, logs, ""]))
        self._terminal.highlight(tables[0])
        for table in tables[1:]:
            self._terminal.line(f"\n{table}")

    def _nothing_to_do(self, result: RunResult) -> str | None:
        """A line where a resumed run had ended before, or None."""
        before, accuracy = self._resumption, result.eval_mlm_accuracy
        if before is None or before.steps != result.step:
            return None
        known = {
            "target": f"has reached the target {self._target} before (MLM accuracy "
            f"{accuracy:.4f}); to train on, pass a higher --target_mlm_accuracy",
            "max_steps": f"has made {counted(result.step, 'step')}; to train on, pass a higher "
            "--max_steps",
            "max_samples_termination": f"has trained on {counted(result.samples, 'sequence')}; to "
            "train on, pass a higher --max_samples_termination",
        }
        if result.reason not in known:  # a signal came before the first step
            return None
        what = known[result.reason]
        return f"Nothing to do: {before.checkpoint} {what}; to start over, --resume never"

    def _what_now(self, result: RunResult) -> list[str]:
        """What to know of the run's checkpoint, if anything."""
        config = self._run.config
        if result.reason.startswith("signal"):
            more = "" if config.resume in ("auto", "required") else " with --resume auto"
            return [f"To go on: the same command{more}"]
        if config.save_checkpoint or result.reason == "an error":  # an error says itself what to do
            return []
        return ["No checkpoint was kept; --save_checkpoint keeps one"]

    def close(self) -> None:
        self._terminal.close()
        self._file.close()

    def _tell(self, text: str) -> None:
        self._file.line(text)
        self._terminal.line(text)

    def _tell_figures(self, parts: dict[str, str], grows_by: int = 0) -> None:
        """One line; a terminal gets it without some of LEFT_OUT where it would wrap.

        parts: by name. grows_by: the characters by which such a line may become longer.
        """
        line = ", ".join(parts.values())
        self._file.line(line)
        if self._terminal.is_watched:
            for name in LEFT_OUT:
                if len(line) + grows_by > self._terminal.columns:
                    parts.pop(name, None)
                    line = ", ".join(parts.values())
        self._terminal.highlight(line)

    def _highlight(self, text: str) -> None:
        self._file.line(text)
        self._terminal.highlight(text)
